// Rules on the golden cases of the float64 oracle, on float and on double. The file that has the
// cases is written by `python tests/oracle.py --write FILE` (its docstring defines the format) and
// also holds how far each result may be off.
#pragma once

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <limits>
#include <map>
#include <string>
#include <vector>

#include "check.h"
#include "rules/all.h"

namespace fusedopt::testing {

struct Case {
  std::string name, rule;
  std::vector<double> hyper;
  double step = 0;
  bool first = false;
  std::vector<std::string> states;
  std::vector<std::vector<double>> elements;
};

[[noreturn]] inline void die(const std::string& message) {
  std::fprintf(stderr, "rule_test: %s\n", message.c_str());
  std::exit(2);
}

// The file as a stream of words.
class Reader {
 public:
  explicit Reader(const char* path) : file_(path) {
    if (!file_) die(std::string("cannot read ") + path);
  }

  bool word(std::string& out) {
    while (file_ >> out) {
      if (out[0] != '#') return true;
      std::getline(file_, out);
    }
    return false;
  }
  std::string text() {
    std::string out;
    if (!word(out)) die("the file ends inside a case");
    return out;
  }
  void expect(const char* wanted) {
    if (text() != wanted) die(std::string("wanted the word ") + wanted);
  }
  // Streams do not read hexadecimal floats; strtod does.
  double number() {
    const std::string digits = text();
    char* end = nullptr;
    const double value = std::strtod(digits.c_str(), &end);
    if (*end != '\0') die("not a number: " + digits);
    return value;
  }

  bool next(Case& c) {
    std::string keyword;
    if (!word(keyword)) return false;
    if (keyword != "case") die("wanted the word case, got " + keyword);
    c = {};
    c.name = text();
    expect("rule");
    c.rule = text();
    expect("hyper");
    c.hyper.resize(static_cast<size_t>(number()));
    for (double& h : c.hyper) h = number();
    expect("step");
    c.step = number();
    expect("first");
    c.first = number() != 0;
    expect("states");
    c.states.resize(static_cast<size_t>(number()));
    for (std::string& s : c.states) s = text();
    expect("elements");
    c.elements.resize(static_cast<size_t>(number()));
    const size_t columns = 2 + c.states.size() + 3 * (1 + c.states.size());
    for (auto& element : c.elements) {
      element.resize(columns);
      for (double& x : element) x = number();
    }
    return true;
  }

 private:
  std::ifstream file_;
};

inline long checked = 0;

inline std::string exact(double x) {
  char text[32];
  std::snprintf(text, sizeof text, "%.17g", x);
  return text;
}

// `bounds` is the column of an element where the bounds of T begin. One failure a case and array,
// of its worst element, so that the report stays readable when a rule is all wrong.
template <class Rule, int kVariant, class T>
void run(const Case& c, const typename Rule::Hyper& hyper, size_t bounds, const char* type) {
  const size_t states = c.states.size();
  double scalar_states[kMaxScalarStates] = {};
  for (int k = 0; k < Rule::kScalarStates.count; ++k) {
    const ScalarState& state = Rule::kScalarStates.states[k];
    const bool is_private = state.name[0] == '_';
    scalar_states[k] = is_private ? (c.first ? state.initial : state.loaded) : c.step - 1;
  }
  const auto scalars = Rule::template prepare<T>(hyper, scalar_states);
  std::vector<double> worst(1 + states, 0.0);  // error over bound
  std::vector<std::string> report(1 + states);
  for (size_t e = 0; e < c.elements.size(); ++e) {
    const std::vector<double>& element = c.elements[e];
    T param = static_cast<T>(element[0]);
    T state[kMaxStates] = {};
    for (size_t k = 0; k < states; ++k) state[k] = static_cast<T>(element[2 + k]);
    Rule::template update<kVariant>(param, static_cast<T>(element[1]), state, scalars);
    for (size_t k = 0; k <= states; ++k) {
      const double got = k == 0 ? param : state[k - 1];
      const double wanted = element[2 + states + k];
      const double bound = element[bounds + k];
      double ratio = std::fabs(got - wanted) / bound;
      if (std::isnan(ratio)) ratio = std::numeric_limits<double>::infinity();
      ++checked;
      if (ratio <= worst[k]) continue;
      worst[k] = ratio;
      report[k] = c.name + " on " + type + ", element " + std::to_string(e) + ", " +
                  (k == 0 ? "param" : c.states[k - 1]) + ": got " + exact(got) + ", oracle " +
                  exact(wanted) + ", off by " + exact(ratio) + " times the bound";
    }
  }
  for (size_t k = 0; k <= states; ++k) CHECK(worst[k] <= 1.0, report[k]);
}

template <class Rule, int kVariant = 0>
void run_variant(const Case& c, const typename Rule::Hyper& hyper, int variant) {
  if constexpr (kVariant < Rule::kVariants) {
    if (variant != kVariant) return run_variant<Rule, kVariant + 1>(c, hyper, variant);
    constexpr StateNames kNames = Rule::states(kVariant);
    bool same = static_cast<size_t>(kNames.count) == c.states.size();
    for (int k = 0; same && k < kNames.count; ++k) same = c.states[k] == kNames.names[k];
    CHECK(same, c.name + ": the rule's states(variant) are not the oracle's states");
    if (!same) return;
    const size_t bounds = 2 + c.states.size() + 1 + c.states.size();
    run<Rule, kVariant, float>(c, hyper, bounds, "float");
    run<Rule, kVariant, double>(c, hyper, bounds + 1 + c.states.size(), "double");
  } else {
    CHECK(false, c.name + ": variant(hyper) is out of range");
  }
}

template <class Rule>
void run_rule(const Case& c) {
  constexpr size_t kHypers = sizeof(Rule::kHyperNames) / sizeof(Rule::kHyperNames[0]);
  static_assert(sizeof(typename Rule::Hyper) == kHypers * sizeof(double),
                "Hyper holds one double a name");
  if (c.hyper.size() != kHypers) die(c.name + ": wrong number of hyperparameters");
  typename Rule::Hyper hyper;
  std::memcpy(&hyper, c.hyper.data(), sizeof hyper);
  run_variant<Rule>(c, hyper, Rule::variant(hyper));
}

using Rules = std::map<std::string, void (*)(const Case&)>;

// For FUSEDOPT_FOR_EACH_RULE: the entries of such a map.
#define FUSEDOPT_RUN_RULE(name, Rule) {name, fusedopt::testing::run_rule<Rule>},

// Runs all cases of a file; returns the exit status of main.
inline int run_cases(const Rules& rules, const char* file) {
  std::map<std::string, int> seen;
  Reader reader(file);
  for (Case c; reader.next(c);) {
    const auto rule = rules.find(c.rule);
    if (rule == rules.end()) die("no rule named " + c.rule);
    ++seen[c.rule];
    rule->second(c);
  }
  for (const auto& rule : rules) {
    CHECK(seen[rule.first] > 0, "no golden case for the rule " + rule.first);
  }
  return check::finish("rule_test", checked);
}

}  // namespace fusedopt::testing
