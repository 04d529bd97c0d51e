// Runs every rule of the registry on the golden cases. Usage: rule_test FILE
#include "rule_cases.h"

int main(int argc, char** argv) {
  using namespace fusedopt;
  if (argc != 2) testing::die("usage: rule_test FILE");
  return testing::run_cases({FUSEDOPT_FOR_EACH_RULE(FUSEDOPT_RUN_RULE)}, argv[1]);
}
