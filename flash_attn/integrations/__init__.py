"""Ways into other packages. Each module imports the package it is for; none is imported by flash_attn itself."""
