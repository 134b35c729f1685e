// Takes the page into the program as it is, when this is assembled: the folder deploy/ must be the
// working directory, or one of the assembler's (-Wa,-I).
#include "service/page.hpp"

// clang-format off
__asm__(
    ".section .rodata\n"
    ".global anybit_page_begin, anybit_page_end\n"
    "anybit_page_begin: .incbin \"web/index.html\"\n"
    "anybit_page_end:\n"
    ".previous\n");
// clang-format on

extern "C" const char anybit_page_begin[], anybit_page_end[];

namespace anybit::service {

std::string_view page() {
  return {anybit_page_begin, static_cast<size_t>(anybit_page_end - anybit_page_begin)};
}

}  // namespace anybit::service
