// Something to compile for test_headers, whose precompiled headers the suites use.
int main() { return 0; }
