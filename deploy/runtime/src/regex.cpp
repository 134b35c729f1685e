// A parser of patterns into a tree, a compiler of the tree into steps, and the matcher of steps, which
// keeps its own stack: no text makes it recurse.
#include "regex.hpp"

#include <algorithm>
#include <optional>

#include "anybit/error.hpp"

namespace anybit {
namespace {

constexpr size_t kStepsPerByte = 2000;
constexpr uint32_t kNoLimit = ~uint32_t{0};
constexpr uint32_t kUnmark = ~uint32_t{0};  // a way back that gives a mark its earlier value
constexpr uint32_t kMostRepeats = 1000, kMostGroups = 32, kMostSteps = 20000;

struct Node {
  enum class Kind { set, sequence, choice, repeat, look } kind;
  CharSet set;
  std::vector<Node> children;
  uint32_t min = 1, max = 1;
  bool flag = false;    // repeat: possessive; look: negative
  bool folded = false;  // set: a letter under (?i:
  char32_t letter = 0;
};

}  // namespace

void CharSet::add(char32_t first, char32_t last) { ranges_.push_back({first, last}); }
void CharSet::add_category(unicode::Category category) { categories_ |= 1u << category; }

void CharSet::add(const CharSet& other) {
  if (other.negated_ || !other.others_.empty()) {
    others_.push_back(other);
  } else {
    categories_ |= other.categories_;
    ranges_.insert(ranges_.end(), other.ranges_.begin(), other.ranges_.end());
  }
}

void CharSet::finish() {
  for (char32_t code = 0; code < 128; ++code) ascii_[code] = slow(code);
}

bool CharSet::slow(char32_t code) const {
  bool found = categories_ >> unicode::category(code) & 1;
  for (size_t i = 0; !found && i < ranges_.size(); ++i) {
    found = ranges_[i].first <= code && code <= ranges_[i].second;
  }
  for (size_t i = 0; !found && i < others_.size(); ++i) found = others_[i].slow(code);
  return found != negated_;
}

// Reads a pattern by recursive descent, of bounded depth.
class RegexParser {
 public:
  RegexParser(Regex& regex, const std::string& pattern, const std::string& where)
      : regex_(regex), text_(pattern), where_(where) {}

  void run() {
    if (!unicode::is_valid(text_)) refuse("bytes that are not UTF-8");
    Node tree = choice(0);
    if (at_ != text_.size()) refuse(") without (");
    compile_ways(tree);
  }

 private:
  [[noreturn]] void refuse(const std::string& what) const {
    throw Error(where_ + ", the pattern " + printable(text_),
                "got " + what + " at byte " + std::to_string(at_) +
                    ", expected what deploy/runtime/src/regex.hpp lists",
                "Use the tokenizer.json of a family that docs/tokenizer.md lists");
  }

  bool more() const { return at_ < text_.size(); }
  bool starts(std::string_view word) const { return text_.compare(at_, word.size(), word) == 0; }
  bool take(std::string_view word) {
    if (!starts(word)) return false;
    at_ += word.size();
    return true;
  }
  char32_t next() {
    if (!more()) refuse("the end of the pattern");
    const unicode::Decoded one = unicode::decode(text_, at_);
    at_ += one.bytes;
    return one.code;
  }

  Node choice(uint32_t depth) {
    if (depth > kMostGroups) refuse("groups deeper than 32");
    Node node{Node::Kind::choice, {}, {}};
    do node.children.push_back(sequence(depth));
    while (take("|"));
    return node;
  }

  Node sequence(uint32_t depth) {
    Node node{Node::Kind::sequence, {}, {}};
    while (more() && !starts("|") && !starts(")")) {
      Node one = quantified(atom(depth));
      if (one.folded && !node.children.empty() && node.children.back().folded) {
        check_fold(node.children.back().letter, one.letter);
      }
      node.children.push_back(std::move(one));
    }
    return node;
  }

  // Oniguruma folds some pairs of letters into one character, such as ss and sharp s.
  void check_fold(char32_t first, char32_t second) const {
    const std::string pair{static_cast<char>(first), static_cast<char>(second)};
    for (const char* known : {"ss", "st", "ff", "fi", "fl"}) {
      if (pair == known) refuse("the letters " + pair + " in (?i:");
    }
  }

  Node quantified(Node node) {
    Node repeat{Node::Kind::repeat, {}, {}};
    bool counted = false;
    if (take("?")) {
      repeat.min = 0;
    } else if (take("*")) {
      repeat.min = 0, repeat.max = kNoLimit;
    } else if (take("+")) {
      repeat.max = kNoLimit;
    } else if (starts("{")) {
      counts(repeat);
      counted = true;
    } else {
      return node;
    }
    if (node.kind == Node::Kind::look) refuse("a quantifier of a lookahead");
    if (starts("?")) refuse("a lazy quantifier");
    if (counted && starts("+")) refuse("a quantifier of a quantifier");
    repeat.flag = take("+");
    if (starts("*") || starts("+") || starts("?") || starts("{")) {
      refuse("a quantifier of a quantifier");
    }
    if (repeat.flag && node.kind != Node::Kind::set) refuse("a possessive group");
    repeat.children.push_back(std::move(node));
    return repeat;
  }

  uint32_t number() {
    uint32_t value = 0;
    const size_t from = at_;
    while (more() && text_[at_] >= '0' && text_[at_] <= '9') {
      value = value * 10 + (text_[at_++] - '0');
      if (value > kMostRepeats) refuse("a count above 1000");
    }
    if (at_ == from) refuse("a { without a number");
    return value;
  }

  void counts(Node& repeat) {
    take("{");
    repeat.min = repeat.max = number();
    if (take(",")) repeat.max = starts("}") ? kNoLimit : number();
    if (!take("}") || repeat.max < repeat.min) refuse("a { that is no count");
  }

  Node atom(uint32_t depth) {
    if (take("(")) return group(depth);
    if (take("[")) return set_node(bracket());
    for (const char* one : {"^", "$", "*", "+", "?", "{"}) {
      if (starts(one)) refuse(std::string("a ") + one);
    }
    if (take(".")) {
      CharSet set;
      set.add('\n', '\n');
      set.invert();
      return set_node(std::move(set));
    }
    if (starts("\\")) return set_node(escape());
    return literal(next());
  }

  Node group(uint32_t depth) {
    const bool before = folds_;
    Node node{Node::Kind::look, {}, {}};
    if (take("?!")) {
      node.flag = true;
    } else if (!take("?=")) {
      if (take("?i:")) {
        folds_ = true;
      } else if (!take("?:") && starts("?")) {
        refuse("a (? that is none of (?: (?i: (?= (?!");
      }
      node.kind = Node::Kind::sequence;
    }
    node.children.push_back(choice(depth + 1));
    if (!take(")")) refuse("the end of the pattern in a group");
    folds_ = before;
    return node;
  }

  Node set_node(CharSet set) {
    set.finish();
    return {Node::Kind::set, std::move(set), {}};
  }

  Node literal(char32_t code) {
    CharSet set;
    set.add(code, code);
    if (!folds_) return set_node(std::move(set));
    if (code >= 0x80) refuse("a letter beyond ASCII in (?i:");
    const char32_t low = code >= 'A' && code <= 'Z' ? code + 32 : code;
    if (low < 'a' || low > 'z') return set_node(std::move(set));
    set.add(low, low);
    set.add(low - 32, low - 32);
    if (low == 's') set.add(0x17f, 0x17f);    // long s
    if (low == 'k') set.add(0x212a, 0x212a);  // the sign of the kelvin
    Node node = set_node(std::move(set));
    node.folded = true;
    node.letter = low;
    return node;
  }

  CharSet bracket() {
    if (folds_) refuse("a [ in (?i:");
    CharSet set;
    const bool negated = take("^");
    if (starts("]")) refuse("an empty [");
    while (!take("]")) {
      if (starts("[") || starts("&&")) refuse("a set in a set");
      std::optional<char32_t> first = member(set);
      if (!first || !starts("-") || starts("-]")) {
        if (first) set.add(*first, *first);
        continue;
      }
      take("-");
      if (starts("[")) refuse("a set in a set");
      const std::optional<char32_t> last = member(set);
      if (!last || *last < *first) refuse("a range without an end");
      set.add(*first, *last);
    }
    if (negated) set.invert();
    return set;
  }

  // A character of [..], or nothing where it was a class that is added to the set.
  std::optional<char32_t> member(CharSet& set) {
    if (!starts("\\")) return next();
    if (const std::optional<char32_t> code = escaped_character()) return code;
    set.add(escaped_class());
    return std::nullopt;
  }

  CharSet escape() {
    if (const std::optional<char32_t> code = escaped_character()) {
      CharSet set;
      if (folds_ && (*code >= 0x80 || (*code | 32) - 'a' < 26u))
        refuse("an escaped letter in (?i:");
      set.add(*code, *code);
      return set;
    }
    return escaped_class();
  }

  std::optional<char32_t> escaped_character() {
    const size_t from = at_;
    take("\\");
    const char32_t code = next();
    switch (code) {
      case 'r': return '\r';
      case 'n': return '\n';
      case 't': return '\t';
      case 'f': return '\f';
      case 'v': return '\v';
      case 'u': return hex(4, 4);
      case 'x': {
        if (!take("{")) return hex(2, 2);
        const char32_t value = hex(1, 6);
        if (!take("}")) refuse("an \\x{ without its }");
        return value;
      }
      default: break;
    }
    const bool is_word = code >= 0x80 || (code >= '0' && code <= '9') || (code | 32) - 'a' < 26u;
    if (!is_word) return code;  // punctuation stands for itself
    at_ = from;
    return std::nullopt;
  }

  char32_t hex(int least, int most) {
    char32_t value = 0;
    int count = 0;
    for (; count < most && more(); ++count, ++at_) {
      const char c = text_[at_];
      const int digit = c >= '0' && c <= '9'   ? c - '0'
                        : c >= 'a' && c <= 'f' ? c - 'a' + 10
                        : c >= 'A' && c <= 'F' ? c - 'A' + 10
                                               : -1;
      if (digit < 0) break;
      value = value << 4 | static_cast<char32_t>(digit);
    }
    if (count < least || value > 0x10ffff) refuse("no number of a character");
    return value;
  }

  CharSet escaped_class() {
    CharSet set;
    take("\\");
    const char32_t kind = next();
    switch (kind) {
      case 's':
      case 'S':
        set.add(9, 13);
        set.add(0x85, 0x85);
        add_named("Z", set);
        break;
      case 'd':
      case 'D': add_named("Nd", set); break;
      case 'p':
      case 'P': {
        if (!take("{")) refuse("a \\p without {");
        if (take("^")) set.invert();
        std::string name;
        while (more() && !starts("}")) name += text_[at_++];
        if (!take("}") || !add_named(name, set)) refuse("\\p{" + name + "}");
        break;
      }
      default: refuse(std::string("\\") + static_cast<char>(kind));
    }
    if (kind == 'S' || kind == 'D' || kind == 'P') set.invert();
    CharSet whole;  // so that a negated one may be a member
    whole.add(set);
    return whole;
  }

  // Adds a category such as Lu, or all that begin with L.
  static bool add_named(const std::string& name, CharSet& set) {
    bool found = false;
    for (int i = 0; i < unicode::kCategories && !name.empty(); ++i) {
      const std::string one = unicode::kCategoryNames[i];
      if (one == name || (name.size() == 1 && one[0] == name[0])) {
        set.add_category(static_cast<unicode::Category>(i));
        found = true;
      }
    }
    return found;
  }

  // --- The tree as steps.

  void compile_ways(const Node& tree) {
    for (const Node& way : tree.children) {
      const size_t index = regex_.ways_.size();
      regex_.ways_.push_back(here());
      compile(way);
      emit_match();
      std::array<bool, 128> first{};
      const bool nullable = first_of(way, first);
      for (size_t code = 0; code < 128 && index < 64; ++code) {
        if (nullable || first[code]) regex_.may_begin_[code] |= uint64_t{1} << index;
      }
    }
  }

  // Adds the ASCII characters that a match may begin with; true where it may be empty, or look ahead.
  static bool first_of(const Node& node, std::array<bool, 128>& first) {
    switch (node.kind) {
      case Node::Kind::set:
        for (size_t code = 0; code < 128; ++code) first[code] |= node.set.has_ascii(code);
        return false;
      case Node::Kind::sequence:
        return std::all_of(node.children.begin(), node.children.end(),
                           [&](const Node& one) { return first_of(one, first); });
      case Node::Kind::choice: {
        bool nullable = false;
        for (const Node& one : node.children) nullable |= first_of(one, first);
        return nullable;
      }
      case Node::Kind::repeat: return first_of(node.children[0], first) || node.min == 0;
      case Node::Kind::look: return true;
    }
    return true;
  }

  uint32_t here() const { return static_cast<uint32_t>(regex_.steps_.size()); }

  uint32_t emit(Regex::Step step) {
    if (here() > kMostSteps) refuse("more than 20000 steps");
    regex_.steps_.push_back(step);
    return here() - 1;
  }

  void emit_match() {
    // What a loop right before it could give back is never asked for.
    if (here() > 0 && regex_.steps_.back().op == Regex::Op::loop) regex_.steps_.back().flag = true;
    emit({Regex::Op::match});
  }

  uint32_t set_of(const Node& node) {
    regex_.sets_.push_back(node.set);
    return static_cast<uint32_t>(regex_.sets_.size()) - 1;
  }

  void compile(const Node& node) {
    using Op = Regex::Op;
    switch (node.kind) {
      case Node::Kind::set: emit({Op::set, false, set_of(node)}); break;
      case Node::Kind::sequence:
        for (const Node& one : node.children) compile(one);
        break;
      case Node::Kind::choice: {
        std::vector<uint32_t> jumps;
        for (size_t i = 0; i < node.children.size(); ++i) {
          const bool last = i + 1 == node.children.size();
          const uint32_t split = last ? 0 : emit({Op::split, false, here() + 1});
          compile(node.children[i]);
          if (last) break;
          jumps.push_back(emit({Op::jump}));
          regex_.steps_[split].b = here();
        }
        for (const uint32_t jump : jumps) regex_.steps_[jump].a = here();
        break;
      }
      case Node::Kind::repeat: compile_repeat(node); break;
      case Node::Kind::look: {
        const uint32_t look = emit({Op::look, node.flag});
        compile(node.children[0]);
        emit_match();
        regex_.steps_[look].a = here();
        break;
      }
    }
  }

  void compile_repeat(const Node& node) {
    using Op = Regex::Op;
    const Node& body = node.children[0];
    if (body.kind == Node::Kind::set) {
      emit({Op::loop, node.flag, set_of(body), 0, node.min, node.max});
      return;
    }
    for (uint32_t i = 0; i < node.min; ++i) compile(body);
    if (node.max == kNoLimit) {
      // A round that takes nothing is the last, as in Oniguruma.
      const uint32_t split = emit({Op::split, false, here() + 1});
      const uint32_t mark = regex_.marks_++;
      emit({Op::mark, false, mark});
      compile(body);
      const uint32_t moved = emit({Op::moved, false, mark});
      emit({Op::jump, false, split});
      regex_.steps_[split].b = regex_.steps_[moved].b = here();
      return;
    }
    std::vector<uint32_t> splits;
    for (uint32_t i = node.min; i < node.max; ++i) {
      splits.push_back(emit({Op::split, false, here() + 1}));
      compile(body);
    }
    for (const uint32_t split : splits) regex_.steps_[split].b = here();
  }

  Regex& regex_;
  const std::string& text_;
  const std::string& where_;
  size_t at_ = 0;
  bool folds_ = false;  // within (?i:
};

Regex::Regex(const std::string& pattern, const std::string& where)
    : pattern_(pattern), where_(where) {
  RegexParser(*this, pattern_, where_).run();
}

// One text and what the matcher remembers of it.
struct Regex::Search {
  std::string_view text;
  size_t budget;
  std::vector<size_t> marks;
  std::vector<Back> stack;
};

bool Regex::match(Search& search, uint32_t step, size_t at, size_t& end) const {
  std::vector<Back>& stack = search.stack;
  const size_t bottom = stack.size();  // what lies below belongs to a match that looks ahead
  const char* const begin = search.text.data();
  const size_t size = search.text.size();
  for (;;) {
    if (search.budget == 0) {
      throw Error(where_ + ", the pattern " + printable(pattern_),
                  "got a text on which it takes more than 2000 steps for each byte, expected fewer",
                  "Leave the text out, or use a tokenizer.json with another pattern");
    }
    --search.budget;
    const Step& now = steps_[step];
    bool failed = false;
    switch (now.op) {
      case Op::set:
        failed = at == size || !sets_[now.a].has(unicode::code_at(begin + at));
        if (!failed) at += unicode::length_of(begin[at]);
        ++step;
        break;
      case Op::loop: {
        const CharSet& set = sets_[now.a];
        size_t least = at;
        uint32_t count = 0;
        while (count < now.max && at < size && set.has(unicode::code_at(begin + at))) {
          at += unicode::length_of(begin[at]);
          if (++count == now.min) least = at;
        }
        search.budget -= std::min<size_t>(search.budget, count / 8);
        failed = count < now.min;
        if (!failed && !now.flag && least < at) stack.push_back({step + 1, at, least});
        ++step;
        break;
      }
      case Op::split:
        stack.push_back({now.b, at, at});
        step = now.a;
        break;
      case Op::jump: step = now.a; break;
      case Op::look: {
        size_t ignored;
        failed = match(search, step + 1, at, ignored) == now.flag;
        step = now.a;
        break;
      }
      case Op::mark:
        stack.push_back({kUnmark, now.a, search.marks[now.a]});
        search.marks[now.a] = at;
        ++step;
        break;
      case Op::moved: step = search.marks[now.a] == at ? now.b : step + 1; break;
      case Op::match:
        stack.resize(bottom);
        end = at;
        return true;
    }
    if (!failed) continue;
    for (; stack.size() > bottom && stack.back().step == kUnmark; stack.pop_back()) {
      search.marks[stack.back().at] = stack.back().least;
    }
    if (stack.size() == bottom) return false;
    Back& back = stack.back();
    step = back.step;
    if (back.least < back.at) {
      do --back.at;
      while (unicode::is_continuation(begin[back.at]));
    }
    at = back.at;
    if (back.least == back.at) stack.pop_back();
  }
}

void Regex::find_all(std::string_view text, std::vector<Match>& found) const {
  Search search{text, kStepsPerByte * (text.size() + 1), std::vector<size_t>(marks_), {}};
  const auto match_at = [&](size_t at, size_t& end) {
    const unsigned char byte = at < text.size() ? text[at] : 0x80;
    const uint64_t may = byte < 128 ? may_begin_[byte] : ~uint64_t{0};
    for (size_t way = 0; way < ways_.size(); ++way) {
      if ((way >= 64 || may >> way & 1) && match(search, ways_[way], at, end)) return true;
    }
    return false;
  };
  size_t last = ~size_t{0};  // end of the last match
  for (size_t at = 0; at <= text.size();) {
    size_t end;
    if (match_at(at, end) && !(end == at && last == at)) {
      found.push_back({at, end});
      last = end;
      if (end != at) at = end;
      continue;
    }
    at += at < text.size() ? unicode::length_of(text[at]) : 1;
  }
}

}  // namespace anybit
