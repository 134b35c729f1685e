// Looks for stop strings in text that comes in pieces.
#pragma once
#include <string>
#include <vector>

namespace anybit {

class Stops {
 public:
  // stops: none of them empty.
  explicit Stops(std::vector<std::string> stops) : stops_(std::move(stops)) {}

  // The text that may be shown by now. Of a stop string that has been found, and of what may become
  // one, nothing is.
  std::string push(const std::string& text);

  // What is held back when nothing more comes.
  std::string finish();

  // The stop string that was found; "" while none was. Of several the one that begins first counts,
  // of these the first in the list.
  const std::string& found() const { return found_; }

 private:
  std::vector<std::string> stops_;
  std::string held_, found_;
};

}  // namespace anybit
