"""How far one segment has come at one destination: what was cut, what is under way, what is durable."""
