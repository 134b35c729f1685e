// SHA-256 of a file (FIPS 180-4).
#pragma once
#include <filesystem>
#include <string>

namespace anybit {

// 64 hexadecimal digits. Throws Error: the file cannot be read.
std::string sha256_file(const std::filesystem::path& path);

}  // namespace anybit
