"""How the demo's pictures, teacher and adapters were made. Nothing outside imports this room."""
