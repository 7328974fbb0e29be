"""What describes single pictures beside the feature network: hidden states, random features, sharpness, preference."""
