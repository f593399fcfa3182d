"""What a run shows of itself while it trains: pictures and warnings."""
