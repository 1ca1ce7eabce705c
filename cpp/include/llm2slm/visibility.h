/* What the shared library shows. Everything else in it is hidden. */
#ifndef LLM2SLM_VISIBILITY_H
#define LLM2SLM_VISIBILITY_H

#if defined(__GNUC__) || defined(__clang__)
#define LLM2SLM_API __attribute__((visibility("default")))
#else
#define LLM2SLM_API
#endif

#endif
