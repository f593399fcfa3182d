"""Lets `--network_module networks.spf_lora` find spf_plugin; install.py copies this file into sd-scripts' networks/."""

from spf_plugin.lora import create_network, create_network_from_weights

__all__ = ["create_network", "create_network_from_weights"]
