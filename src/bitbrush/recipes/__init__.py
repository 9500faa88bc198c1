"""One TOML file a method; `bitbrush recipes show NAME` prints it expanded."""
