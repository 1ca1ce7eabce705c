/* llm2slm's C ABI, for any language that can call C. A complete program:
 *
 *     #include <stdio.h>
 *     #include <llm2slm/llm2slm.h>
 *
 *     int main(int argc, char** argv) {
 *       llm2slm_pair* pair = NULL;
 *       llm2slm_generations* responses = NULL;
 *       llm2slm_error* error = NULL;
 *       const char* prompts[] = {argc > 2 ? argv[2] : "How are you?"};
 *       if (llm2slm_pair_open(argv[1], NULL, &pair, &error) == LLM2SLM_OK &&
 *           llm2slm_generate(pair, prompts, NULL, 1, NULL, &responses, &error) == LLM2SLM_OK)
 *         puts(llm2slm_generations_text(responses, 0, NULL));
 *       else
 *         fprintf(stderr, "%s\n", llm2slm_error_message(error));
 *       llm2slm_error_free(error);
 *       llm2slm_generations_free(responses);
 *       llm2slm_pair_free(pair);
 *     }
 *
 * Until 1.0 the ABI may change: LLM2SLM_ABI_VERSION is raised with every change. All handles are opaque. Every call that can
 * fail returns a status. Its last argument receives an error with the message; it may be NULL, and the caller frees the error with
 * llm2slm_error_free. A failed call sets its results to NULL. NULL for a required handle or pointer gives LLM2SLM_USAGE. No
 * exception leaves the library, and it never ends the process. Text is UTF-8. Several threads may use a pair or an encoding at
 * once; every other handle belongs to one thread. */
#ifndef LLM2SLM_LLM2SLM_H
#define LLM2SLM_LLM2SLM_H

#include <stddef.h>
#include <stdint.h>

#include "llm2slm/visibility.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct llm2slm_pair llm2slm_pair;
typedef struct llm2slm_pair_options llm2slm_pair_options;
typedef struct llm2slm_generation_options llm2slm_generation_options;
typedef struct llm2slm_generations llm2slm_generations;
typedef struct llm2slm_encoding llm2slm_encoding;
typedef struct llm2slm_error llm2slm_error;

typedef enum llm2slm_status {
  LLM2SLM_OK = 0,
  LLM2SLM_USAGE = 1,         /* an invalid call or option */
  LLM2SLM_BUNDLE = 2,        /* a bundle that is missing, altered, of a newer release, or whose decoder gives no finite logits */
  LLM2SLM_PROMPT = 3,        /* a prompt that cannot be run: empty, too long, not UTF-8 */
  LLM2SLM_ENCODING = 4,      /* a file of an encoding, or one that another pair made */
  LLM2SLM_RUNTIME = 5,       /* ONNX Runtime: not found, too old, or failing */
  LLM2SLM_OUT_OF_MEMORY = 6, /* memory ran out */
  LLM2SLM_INTERNAL = 7       /* a mistake of this library */
} llm2slm_status;

typedef enum llm2slm_finish_reason {
  LLM2SLM_UNFINISHED = 0,
  LLM2SLM_STOP = 1,  /* an end-of-sequence token or a stop string */
  LLM2SLM_LENGTH = 2 /* max_new_tokens */
} llm2slm_finish_reason;

/* The version of the library, such as "0.1.0", and of this ABI, which is raised with every change. */
#define LLM2SLM_ABI_VERSION 4
LLM2SLM_API const char* llm2slm_version(void);
LLM2SLM_API int32_t llm2slm_abi_version(void);

/* An error. NULL has the status LLM2SLM_OK and a message that there is no error. If memory runs out, a call may return a status
 * without an error. */
LLM2SLM_API llm2slm_status llm2slm_error_status(const llm2slm_error* error);
LLM2SLM_API const char* llm2slm_error_message(const llm2slm_error* error);
LLM2SLM_API void llm2slm_error_free(llm2slm_error* error);

/* Options of a pair. Names: int `threads` (inside one operator; 0: ONNX Runtime's choice); string `head`, `part` (`pair`,
 * `reader`, `writer`), `ort_library` (path of ONNX Runtime's shared library). Unknown names are LLM2SLM_USAGE. */
LLM2SLM_API llm2slm_status llm2slm_pair_options_new(llm2slm_pair_options** options, llm2slm_error** error);
LLM2SLM_API llm2slm_status llm2slm_pair_options_set_int(llm2slm_pair_options* options, const char* name, int64_t value,
                                                        llm2slm_error** error);
LLM2SLM_API llm2slm_status llm2slm_pair_options_set_string(llm2slm_pair_options* options, const char* name,
                                                           const char* value, llm2slm_error** error);
/* The program's own ONNX Runtime: its `OrtGetApiBase()`, a `const OrtApiBase*`. */
LLM2SLM_API llm2slm_status llm2slm_pair_options_set_ort_api_base(llm2slm_pair_options* options, const void* base,
                                                                 llm2slm_error** error);
LLM2SLM_API void llm2slm_pair_options_free(llm2slm_pair_options* options);

/* Generation options, with transformers' names, and those of drafting, with the Python package's. Unset options take the bundle's
 * defaults. Names:
 *   int     max_new_tokens min_new_tokens do_sample (0, 1) num_beams num_return_sequences early_stopping (0, 1) top_k
 *           no_repeat_ngram_size forced_bos_token_id forced_eos_token_id seed output_scores (0, 1) truncate (0, 1) batch_size
 *           split_special_tokens (0, 1) num_draft_tokens
 *   number  length_penalty temperature top_p min_p typical_p repetition_penalty defer
 *   string  early_stopping ("never") stop (each call adds one) drafter ("ngram") verifier (a head) */
LLM2SLM_API llm2slm_status llm2slm_generation_options_new(llm2slm_generation_options** options, llm2slm_error** error);
LLM2SLM_API llm2slm_status llm2slm_generation_options_set_int(llm2slm_generation_options* options, const char* name,
                                                              int64_t value, llm2slm_error** error);
LLM2SLM_API llm2slm_status llm2slm_generation_options_set_number(llm2slm_generation_options* options, const char* name,
                                                                 double value, llm2slm_error** error);
LLM2SLM_API llm2slm_status llm2slm_generation_options_set_string(llm2slm_generation_options* options, const char* name,
                                                                 const char* value, llm2slm_error** error);
/* Add a sequence of token ids that is never completed. */
LLM2SLM_API llm2slm_status llm2slm_generation_options_add_bad_word(llm2slm_generation_options* options, const int64_t* ids,
                                                                   size_t count, llm2slm_error** error);
LLM2SLM_API void llm2slm_generation_options_free(llm2slm_generation_options* options);

/* Open a bundle, a directory that `llm2slm-export build` wrote. options: NULL for none. */
LLM2SLM_API llm2slm_status llm2slm_pair_open(const char* bundle, const llm2slm_pair_options* options,
                                             llm2slm_pair** pair, llm2slm_error** error);
/* The pair of another head of the bundle; both share the encoder. It may outlive the first. */
LLM2SLM_API llm2slm_status llm2slm_pair_head(const llm2slm_pair* pair, const char* head, llm2slm_pair** opened,
                                             llm2slm_error** error);
LLM2SLM_API void llm2slm_pair_free(llm2slm_pair* pair);
/* Properties of a pair; NULL or 0 if it is NULL. The texts live as long as the pair. */
LLM2SLM_API const char* llm2slm_pair_name(const llm2slm_pair* pair);
LLM2SLM_API const char* llm2slm_pair_head_name(const llm2slm_pair* pair);
LLM2SLM_API size_t llm2slm_pair_head_count(const llm2slm_pair* pair);
LLM2SLM_API const char* llm2slm_pair_head_at(const llm2slm_pair* pair, size_t index);
LLM2SLM_API size_t llm2slm_pair_max_prompt_tokens(const llm2slm_pair* pair);
LLM2SLM_API const char* llm2slm_pair_runtime_version(const llm2slm_pair* pair);

/* The responses to `count` prompts, in their order. lengths: bytes of each prompt; NULL: they end with NUL. options: NULL for none. */
LLM2SLM_API llm2slm_status llm2slm_generate(const llm2slm_pair* pair, const char* const* prompts, const size_t* lengths,
                                            size_t count, const llm2slm_generation_options* options,
                                            llm2slm_generations** responses, llm2slm_error** error);

/* One token of a response. Later releases may add members at the end; `struct_size` is the size in the library. The text may be
 * empty, and lives during the callback. */
typedef struct llm2slm_step {
  size_t struct_size;
  int64_t token_id;
  const char* text;
  size_t text_length;
  llm2slm_finish_reason finish_reason; /* LLM2SLM_UNFINISHED on every step but the last */
  float logprob;                       /* NaN without output_scores */
} llm2slm_step;

/* Receives a step. Returns 0 to stop, another value to continue. It must not throw. */
typedef int (*llm2slm_on_step)(const llm2slm_step* step, void* user);

/* The response to one prompt, token by token. length: bytes of the prompt, or SIZE_MAX where it ends with NUL. */
LLM2SLM_API llm2slm_status llm2slm_stream(const llm2slm_pair* pair, const char* prompt, size_t length,
                                          const llm2slm_generation_options* options, llm2slm_on_step on_step, void* user,
                                          llm2slm_error** error);

/* The output of encoder and projector for prompts: reusable. Only the options `truncate` and `split_special_tokens` apply. */
LLM2SLM_API llm2slm_status llm2slm_encode(const llm2slm_pair* pair, const char* const* prompts, const size_t* lengths,
                                          size_t count, const llm2slm_generation_options* options,
                                          llm2slm_encoding** encoding, llm2slm_error** error);
LLM2SLM_API llm2slm_status llm2slm_generate_from(const llm2slm_pair* pair, const llm2slm_encoding* encoding,
                                                 const llm2slm_generation_options* options, llm2slm_generations** responses,
                                                 llm2slm_error** error);
/* Save or load an encoding as a safetensors file, the same as Python's. */
LLM2SLM_API llm2slm_status llm2slm_encoding_save(const llm2slm_pair* pair, const llm2slm_encoding* encoding,
                                                 const char* path, llm2slm_error** error);
LLM2SLM_API llm2slm_status llm2slm_encoding_load(const llm2slm_pair* pair, const char* path, llm2slm_encoding** encoding,
                                                 llm2slm_error** error);
LLM2SLM_API size_t llm2slm_encoding_size(const llm2slm_encoding* encoding);
LLM2SLM_API void llm2slm_encoding_free(llm2slm_encoding* encoding);

/* The responses of a call. NULL responses and invalid indices give NULL, 0 or NaN. Texts and arrays live as long as the responses. A
 * text ends with NUL, which `length` does not count; `length` may be NULL. */
LLM2SLM_API size_t llm2slm_generations_count(const llm2slm_generations* responses);
LLM2SLM_API const char* llm2slm_generations_text(const llm2slm_generations* responses, size_t index, size_t* length);
LLM2SLM_API const int64_t* llm2slm_generations_token_ids(const llm2slm_generations* responses, size_t index, size_t* count);
LLM2SLM_API llm2slm_finish_reason llm2slm_generations_finish_reason(const llm2slm_generations* responses, size_t index);
/* With output_scores, one log-probability per token. */
LLM2SLM_API const float* llm2slm_generations_logprobs(const llm2slm_generations* responses, size_t index, size_t* count);
/* Numbers by name: prompt_tokens, dropped_tokens, batch, sequence, score (of a beam), drafted_tokens and accepted_tokens (with
 * drafting), and in milliseconds tokenize, encode, project, prefill, decode, total. NaN for any other name. */
LLM2SLM_API double llm2slm_generations_number(const llm2slm_generations* responses, size_t index, const char* name);
LLM2SLM_API void llm2slm_generations_free(llm2slm_generations* responses);

#ifdef __cplusplus
}
#endif

#endif
