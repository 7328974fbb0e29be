"""The demo's teacher: its architecture, training and export."""
