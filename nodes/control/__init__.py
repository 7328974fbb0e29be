"""Use ControlNets, Control-LoRAs and T2I-adapters in few steps."""
