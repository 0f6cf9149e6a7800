"""What any program of many processes needs: who holds a folder, what ends it, who is still there."""
