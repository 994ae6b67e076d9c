"""What runs methods: streams, training, data, measuring."""
