"""The C++ runtime library: headers in include/, sources in src/, and how they are built."""
