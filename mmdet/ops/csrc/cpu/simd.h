// Functions marked MMDET_SIMD are compiled for several x86 instruction sets; the loader picks what the CPU has.
#pragma once

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#define MMDET_SIMD __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define MMDET_SIMD
#endif
