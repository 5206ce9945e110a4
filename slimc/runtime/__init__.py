"""What a compressed model needs to run: packed formats, the slim operators, and the modules that call them."""
