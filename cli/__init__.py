"""The command line of sparsesearch: thin commands over the library."""
