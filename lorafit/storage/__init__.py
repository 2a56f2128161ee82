"""How bytes reach the disk, whatever they say: whole or not at all, known by their hash, and owned by one process."""
