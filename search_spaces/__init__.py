"""What may be tried: one YAML per published method and per mixture."""
