// Runs every test; the exit status is 0 if all passed.
#include "tests/check.h"

int main() {
  using namespace hstu_ops::test;
  for (const Test& test : tests()) {
    const int before = failures();
    test.run();
    std::printf("%s %s\n", failures() == before ? "ok    " : "FAILED", test.name);
  }
  std::printf("%zu tests, %d failed checks\n", tests().size(), failures());
  return failures() == 0 ? 0 : 1;
}
