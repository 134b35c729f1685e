"""The service anybit-serve, in C++, and how it is built."""
