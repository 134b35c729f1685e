// The one error of this library: where it happened, what was got against what was expected, and
// what to do about it.
#pragma once

#include <stdexcept>
#include <string>

#pragma GCC visibility push(default)
namespace anybit {

// what() is "where: problem. fix." in one line. The parts may quote anybody's text: each is cut in
// the middle where it is longer than 1500 bytes, control characters are escaped and bytes that are
// not UTF-8 replaced.
class Error : public std::runtime_error {
 public:
  // where: the file, option or field; problem: "got X, expected Y"; fix: what the user can do.
  Error(const std::string& where, const std::string& problem, const std::string& fix);

  const std::string& where() const noexcept { return where_; }
  const std::string& problem() const noexcept { return problem_; }
  const std::string& fix() const noexcept { return fix_; }

 private:
  struct Parts;
  explicit Error(Parts parts);

  std::string where_, problem_, fix_;
};

// What was asked for is right, and cannot be had now: memory, a port. Later it may.
class Unavailable : public Error {
 public:
  using Error::Error;
};

// Somebody's text as it may stand in a message or a log line: control characters, marks of the
// writing direction and line separators escaped as \n, \x1b or \u202e, bytes that are not UTF-8
// replaced by U+FFFD, the middle of more than `longest` bytes left out.
std::string printable(const std::string& text, size_t longest = 120);

}  // namespace anybit
#pragma GCC visibility pop
