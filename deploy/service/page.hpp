// The page at /, which is part of the program.
#pragma once
#include <string_view>

namespace anybit::service {

// deploy/web/index.html.
std::string_view page();

}  // namespace anybit::service
