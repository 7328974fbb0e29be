"""What a run of several processes needs: word of the other processes, a shared base, a change of their number."""
