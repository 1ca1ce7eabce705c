/* A library that says it is ONNX Runtime of the version that FAKE_ORT_VERSION names, and has none of its functions: what a program
   finds on a machine with an older one. */
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>

typedef struct {
  const void* (*GetApi)(uint32_t version);
  const char* (*GetVersionString)(void);
} Base;

static const void* api(uint32_t version) {
  (void)version;
  return NULL;
}

static const char* version_string(void) {
  const char* version = getenv("FAKE_ORT_VERSION");
  return version == NULL ? "1.10.0" : version;
}

static const Base base = {api, version_string};

const Base* OrtGetApiBase(void);
const Base* OrtGetApiBase(void) { return &base; }
