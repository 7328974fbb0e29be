"""The embedded demo: where its files are, its pictures, and how both were made."""
