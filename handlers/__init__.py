"""The stations: each does one thing when an event or an order comes, and holds its own way back."""
