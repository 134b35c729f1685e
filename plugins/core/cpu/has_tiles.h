// Whether the set "amx" is compiled: its instructions are written out, but the assembler has to know
// them, and Linux alone is asked for leave to use them.
#pragma once

#if defined(__x86_64__) && defined(__linux__)
#if (defined(__clang_major__) && __clang_major__ >= 12) || \
    (!defined(__clang__) && defined(__GNUC__) && __GNUC__ >= 11)
#define ANYBIT_HAS_TILES
#endif
#endif
