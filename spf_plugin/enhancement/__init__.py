"""Response enhancement (`spf_response`): what the prediction would draw, and whether CLIP sees the target in it."""
