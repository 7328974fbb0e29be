"""The passes of the network: what asks for them, how many they are, and those that guidance spares."""
