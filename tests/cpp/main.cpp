// The test runner, compiled once for all tests: it takes longer than most of them.
#define DOCTEST_CONFIG_IMPLEMENT_WITH_MAIN
#include <doctest/doctest.h>
