// Puts the parts of tokenizer.json together: added tokens, normalizer, pre-tokenizer, model,
// post-processor, decoder.
#include "anybit/tokenizer.hpp"

#include <algorithm>
#include <mutex>
#include <nlohmann/json.hpp>
#include <utility>

#include "added_tokens.hpp"
#include "anybit/error.hpp"
#include "bpe.hpp"
#include "decoder.hpp"
#include "json.hpp"
#include "normalizer.hpp"
#include "pre_tokenizer.hpp"
#include "unicode.hpp"

namespace anybit {
namespace {

constexpr std::string_view kSpace = "\xe2\x96\x81";  // U+2581, of sentencepiece
const std::string kTokenizerFix =
    "Take the model's own tokenizer.json, or one of a family in docs/tokenizer.md";

// The post-processor: which tokens come around a text.
struct Around {
  std::vector<int32_t> before, after;

  explicit Around(const Field& field) {
    if (!field.is_null()) read(field, 0);
  }

  void read(const Field& field, int depth) {
    const std::string kind = field.at("type").text();
    if (depth > kMostDepth) field.refuse("no more than 16 sequences in each other");
    if (kind == "Sequence") {
      const Field all = field.at("processors");
      for (size_t i = 0, count = all.items(); i < count; ++i) read(all.at(i), depth + 1);
    } else if (kind == "TemplateProcessing") {
      read_template(field);
    } else if (kind != "ByteLevel") {  // which changes offsets alone
      field.at("type").refuse("a post-processor of Sequence, TemplateProcessing, ByteLevel");
    }
  }

  void read_template(const Field& field) {
    std::vector<int32_t> left, right;
    bool seen = false;
    const Field single = field.at("single");
    for (size_t i = 0, count = single.items(); i < count; ++i) {
      const Field special = single.at(i).at("SpecialToken");
      if (special.is_null()) {
        const Field sequence = single.at(i).at("Sequence");
        if (sequence.is_null() || seen) single.refuse("one Sequence, and SpecialToken around it");
        seen = true;
        continue;
      }
      const Field ids = field.at("special_tokens").at(special.at("id").text()).at("ids");
      for (size_t k = 0, number = ids.items(); k < number; ++k) {
        (seen ? right : left).push_back(ids.at(k).number(kMostIds - 1));
      }
    }
    if (!seen) single.refuse("one Sequence, and SpecialToken around it");
    before.insert(before.begin(), left.begin(), left.end());
    after.insert(after.end(), right.begin(), right.end());
  }
};

// What one call of encode() works with.
struct Work {
  Bpe::Scratch bpe;
  Pieces pieces;
  std::vector<Stretch> raw, normalized;
};

}  // namespace

struct Tokenizer::Data {
  Normalizer normalizer;
  PreTokenizer pre_tokenizer;
  Bpe model;
  AddedTokens added;
  Around around;
  Decoder decoder;
  bool cuts_before_space;
  std::unordered_map<std::string, int32_t> added_ids;
  int32_t end;  // the largest id and one

  // Each call takes a set to work with and gives it back: as many as there were calls at once.
  mutable std::mutex mutex;
  mutable std::vector<std::unique_ptr<Work>> idle;

  explicit Data(const Field& file)
      : normalizer(file.at("normalizer")),
        pre_tokenizer(file.at("pre_tokenizer")),
        model(file.at("model"), pre_tokenizer.bytes()),
        added(file.at("added_tokens"), model, normalizer),
        around(file.at("post_processor")),
        decoder(file.at("decoder")),
        cuts_before_space(model.cuts_before(kSpace)),
        end(model.end()) {
    for (const auto& [id, token] : added.tokens()) {
      added_ids.emplace(token.content, id);
      end = std::max(end, id + 1);
    }
  }

  const std::string* token(int32_t id) const {
    const auto found = added.tokens().find(id);
    return found == added.tokens().end() ? model.token(id) : &found->second.content;
  }

  bool is_special(int32_t id) const {
    const auto found = added.tokens().find(id);
    return found != added.tokens().end() && found->second.special;
  }

  // What a decoder takes of an id; null: nothing.
  const std::string* shown(int32_t id, bool skip_special) const {
    return skip_special && is_special(id) ? nullptr : token(id);
  }

  void encode_word(std::string_view word, Work& work, std::vector<int32_t>& out) const {
    if (!cuts_before_space) {
      model.encode(word, work.bpe, out);
      return;
    }
    size_t done = 0;
    for (size_t at = word.find(kSpace); at != word.npos; at = word.find(kSpace, at)) {
      const bool run =
          at >= done + kSpace.size() && word.substr(at - kSpace.size(), kSpace.size()) == kSpace;
      if (at > done && !run) {
        model.encode(word.substr(done, at - done), work.bpe, out);
        done = at;
      }
      at += kSpace.size();
    }
    model.encode(word.substr(done), work.bpe, out);
  }

  // `first`: the text that somebody gave begins with this one.
  void encode_plain(std::string_view text, bool first, Work& work,
                    std::vector<int32_t>& out) const {
    const std::string changed = normalizer.is_none() ? "" : normalizer.apply(text);
    if (!normalizer.is_none()) text = changed;
    added.find_normalized(text, work.normalized);
    for (const Stretch& one : work.normalized) {
      if (one.id >= 0) {
        out.push_back(one.id);
        continue;
      }
      const std::string_view part = text.substr(one.begin, one.end - one.begin);
      pre_tokenizer.split(part, first && one.begin == 0, work.pieces);
      for (const Piece& piece : work.pieces.list) encode_word(piece.text, work, out);
    }
  }

  void encode(std::string_view text, const AddedTokens::Plain& plain,
              std::vector<int32_t>& out) const {
    std::unique_ptr<Work> work;
    {
      const std::lock_guard<std::mutex> lock(mutex);
      if (!idle.empty()) {
        work = std::move(idle.back());
        idle.pop_back();
      }
    }
    if (!work) work = std::make_unique<Work>();
    added.find_raw(text, plain, work->raw);
    for (const Stretch& one : work->raw) {
      if (one.id >= 0) {
        out.push_back(one.id);
      } else {
        encode_plain(text.substr(one.begin, one.end - one.begin), one.begin == 0, *work, out);
      }
    }
    const std::lock_guard<std::mutex> lock(mutex);
    idle.push_back(std::move(work));
  }
};

Tokenizer Tokenizer::load(const std::filesystem::path& tokenizer_json) {
  const std::string where = tokenizer_json.string();
  return parse(read_file(where, kTokenizerFix), where);
}

Tokenizer Tokenizer::parse(std::string_view json, const std::string& where) {
  const nlohmann::json file = parse_json(json, where, kTokenizerFix);
  return Tokenizer(std::make_shared<const Data>(Field(file, where, kTokenizerFix)));
}

std::vector<int32_t> Tokenizer::encode(std::string_view utf8, bool add_special) const {
  const std::string mended = unicode::is_valid(utf8) ? "" : unicode::valid(utf8);
  std::vector<int32_t> out;
  if (add_special) out = data_->around.before;
  data_->encode(mended.empty() ? utf8 : mended, {}, out);
  if (add_special) {
    out.insert(out.end(), data_->around.after.begin(), data_->around.after.end());
  }
  return out;
}

std::vector<int32_t> Tokenizer::encode(std::string_view utf8,
                                       const std::vector<std::pair<size_t, size_t>>& plain) const {
  if (!unicode::is_valid(utf8)) {
    throw Error("text", "got bytes that are not UTF-8, expected UTF-8", "Encode the text as UTF-8");
  }
  std::vector<Stretch> found;
  for (const auto& [begin, end] : plain) {
    const std::string text = data_->normalizer.apply(utf8.substr(begin, end - begin));
    data_->added.find_normalized(text, found);
    for (const Stretch& one : found) {
      if (!data_->is_special(one.id)) continue;
      throw Error("text", "got " + printable(*data_->token(one.id)) + ", expected no special token",
                  "Take it out of the text");
    }
  }
  std::vector<int32_t> out;
  data_->encode(utf8, plain, out);
  return out;
}

std::string Tokenizer::decode(const std::vector<int32_t>& tokens, bool skip_special) const {
  Decoder::Way way = data_->decoder.way(Decoder::Bytes::mended);
  for (const int32_t id : tokens) {
    if (const std::string* token = data_->shown(id, skip_special)) way.take(*token);
  }
  way.finish();
  return std::move(way.text());
}

size_t Tokenizer::vocab() const { return static_cast<size_t>(data_->end); }

std::optional<int32_t> Tokenizer::id(std::string_view token) const {
  const auto found = data_->added_ids.find(std::string(token));
  return found == data_->added_ids.end() ? data_->model.id(token) : found->second;
}

std::optional<std::string> Tokenizer::token(int32_t id) const {
  const std::string* found = data_->token(id);
  if (!found) return std::nullopt;
  return *found;
}

std::string Tokenizer::bytes(int32_t id) const {
  const std::string* token = data_->token(id);
  if (!token) return "";
  Decoder::Way way = data_->decoder.way(Decoder::Bytes::raw);
  way.take("a");  // some decoders treat the first token of a text in another way
  const size_t before = way.text().size();
  way.take(*token);
  return way.text().substr(before);
}

bool Tokenizer::is_special(int32_t id) const { return data_->is_special(id); }

struct Tokenizer::Stream::State {
  std::shared_ptr<const Data> data;
  bool skip_special;
  Decoder::Way way;
};

Tokenizer::Stream Tokenizer::stream(bool skip_special) const {
  return Stream(std::make_unique<Stream::State>(
      Stream::State{data_, skip_special, data_->decoder.way(Decoder::Bytes::early)}));
}

Tokenizer::Stream::Stream(std::unique_ptr<State> state) : state_(std::move(state)) {}
Tokenizer::Stream::Stream(Stream&&) noexcept = default;
Tokenizer::Stream& Tokenizer::Stream::operator=(Stream&&) noexcept = default;
Tokenizer::Stream::~Stream() = default;

std::string Tokenizer::Stream::push(int32_t token) {
  if (const std::string* text = state_->data->shown(token, state_->skip_special)) {
    state_->way.take(*text);
  }
  return std::exchange(state_->way.text(), "");
}

std::string Tokenizer::Stream::finish() {
  state_->way.finish();
  return std::exchange(state_->way.text(), "");
}

}  // namespace anybit
