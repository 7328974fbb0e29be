"""What compares two sets of pictures beside a distance: precision, recall, and how far chance moves a distance."""
