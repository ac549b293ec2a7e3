"""The Dockerfile, built and run for real: ``make image-test``. Apart from the other tests, for it takes minutes."""
