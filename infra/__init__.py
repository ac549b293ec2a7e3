"""Whoever is outside: PostgreSQL, stores, keys, clocks, people, monitors. ``wiring`` joins them to the handlers."""
