// SHA-256 as FIPS 180-4 defines it, section 6.2.
#include "sha256.hpp"

#include <array>
#include <cerrno>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <memory>
#include <vector>

#include "anybit/error.hpp"

namespace anybit {
namespace {

constexpr size_t kHashBlock = 64;
constexpr size_t kPiece = size_t{1} << 20;  // bytes read at once

// The upper 32 bits of the fractional part of a prime's root.
uint32_t fraction(long double root) {
  return static_cast<uint32_t>((root - std::floor(root)) * 0x1p32L);
}

struct Constants {
  std::array<uint32_t, 8> start;   // of the square roots of the first 8 primes
  std::array<uint32_t, 64> round;  // of the cube roots of the first 64 primes
};

Constants make_constants() {
  Constants made{};
  size_t count = 0;
  for (unsigned prime = 2; count < made.round.size(); ++prime) {
    bool is_prime = true;
    for (unsigned divisor = 2; divisor * divisor <= prime; ++divisor) {
      is_prime = is_prime && prime % divisor != 0;
    }
    if (!is_prime) continue;
    if (count < made.start.size()) made.start[count] = fraction(std::sqrt((long double)prime));
    made.round[count++] = fraction(std::cbrt((long double)prime));
  }
  return made;
}

const Constants& constants() {
  static const Constants made = make_constants();
  return made;
}

uint32_t rotated(uint32_t x, int by) { return x >> by | x << (32 - by); }

uint32_t big_endian(const unsigned char* bytes) {
  return uint32_t{bytes[0]} << 24 | uint32_t{bytes[1]} << 16 | uint32_t{bytes[2]} << 8 | bytes[3];
}

void add_block(std::array<uint32_t, 8>& hash, const unsigned char* block) {
  std::array<uint32_t, 64> w;
  for (size_t t = 0; t < 16; ++t) w[t] = big_endian(block + 4 * t);
  for (size_t t = 16; t < 64; ++t) {
    const uint32_t s0 = rotated(w[t - 15], 7) ^ rotated(w[t - 15], 18) ^ w[t - 15] >> 3;
    const uint32_t s1 = rotated(w[t - 2], 17) ^ rotated(w[t - 2], 19) ^ w[t - 2] >> 10;
    w[t] = w[t - 16] + s0 + w[t - 7] + s1;
  }
  auto [a, b, c, d, e, f, g, h] = hash;
  const std::array<uint32_t, 64>& k = constants().round;
  for (size_t t = 0; t < 64; ++t) {
    const uint32_t s1 = rotated(e, 6) ^ rotated(e, 11) ^ rotated(e, 25);
    const uint32_t t1 = h + s1 + ((e & f) ^ (~e & g)) + k[t] + w[t];
    const uint32_t s0 = rotated(a, 2) ^ rotated(a, 13) ^ rotated(a, 22);
    const uint32_t t2 = s0 + ((a & b) ^ (a & c) ^ (b & c));
    h = g, g = f, f = e, e = d + t1, d = c, c = b, b = a, a = t1 + t2;
  }
  const std::array<uint32_t, 8> add{a, b, c, d, e, f, g, h};
  for (size_t i = 0; i < hash.size(); ++i) hash[i] += add[i];
}

[[noreturn]] void refuse(const std::filesystem::path& path) {
  throw Error(path.string(), std::string("got ") + strerror(errno) + ", expected a readable file",
              "Check the path and the permissions");
}

}  // namespace

std::string sha256_file(const std::filesystem::path& path) {
  const std::unique_ptr<FILE, int (*)(FILE*)> file(fopen(path.c_str(), "rb"), fclose);
  if (!file) refuse(path);
  std::array<uint32_t, 8> hash = constants().start;
  std::vector<unsigned char> piece(kPiece + 2 * kHashBlock);
  uint64_t bytes = 0;
  for (bool more = true; more;) {
    size_t size = fread(piece.data(), 1, kPiece, file.get());
    if (ferror(file.get())) refuse(path);
    bytes += size;
    more = size == kPiece;
    if (!more) {  // the last piece: a one bit, zeros, and the length in bits
      piece[size++] = 0x80;
      while (size % kHashBlock != kHashBlock - 8) piece[size++] = 0;
      for (int shift = 56; shift >= 0; shift -= 8) {
        piece[size++] = static_cast<unsigned char>(8 * bytes >> shift);
      }
    }
    for (size_t at = 0; at < size; at += kHashBlock) add_block(hash, piece.data() + at);
  }
  std::string hex;
  for (const uint32_t word : hash) {
    char digits[9];
    snprintf(digits, sizeof digits, "%08x", word);
    hex += digits;
  }
  return hex;
}

}  // namespace anybit
