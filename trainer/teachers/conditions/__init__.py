"""Networks beside the UNet that read a condition: ControlNets, T2I-adapters, IP-Adapters, task adapters."""
