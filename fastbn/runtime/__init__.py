"""What the machine offers: CPU and caches, threads, memory."""
