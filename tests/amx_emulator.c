/* AMX without AMX: a handler of SIGILL executes the instructions of AMX-TILE and AMX-BF16.

It knows LDTILECFG, TILERELEASE, TILEZERO, TILELOADD, TILELOADDT1, TILESTORED and TDPBF16PS. Every
other illegal instruction goes to the handler that was there before, and stays an illegal one.
Encodings and arithmetic are those of the Intel SDM, volume 2. It is stricter than silicon: what a
kernel should not do ends in abort() after one sentence on standard error. */

#define _GNU_SOURCE
#include <immintrin.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

enum { LDTILECFG, TILERELEASE, TILEZERO, TILELOADD, TILESTORED, TDPBF16PS, INSTRUCTIONS };
enum { PP_NONE, PP_66, PP_F3, PP_F2 };
enum { DAZ_FTZ_NEAREST_NO_EXCEPTIONS = 0x9fc0 };

typedef struct {
    int configured;
    int rows[8], colsb[8];
    _Alignas(32) uint8_t data[8][16][64];
} Tiles;

static __thread Tiles tiles;
static uint64_t counts[INSTRUCTIONS];
static struct sigaction before;

static void fail(const char *form, ...) {
    char text[200] = "AMX emulator: ";
    va_list values;
    va_start(values, form);
    vsnprintf(text + 14, sizeof text - 14, form, values);
    va_end(values);
    fprintf(stderr, "%s\n", text);
    fflush(stderr);
    abort();
}

static void need_tile(const char *name, int t) {
    if (!tiles.configured) fail("%s came without a configuration.", name);
    if (!tiles.rows[t]) fail("%s uses tile %d, which the configuration leaves empty.", name, t);
}

static void configure(const uint8_t *address) {
    uint8_t c[64];
    memcpy(c, address, 64);
    if (c[0] != 1) fail("ldtilecfg asks for palette %d, and only 1 is known.", c[0]);
    if (c[1]) fail("ldtilecfg begins at row %d, and not at 0.", c[1]);
    for (int i = 2; i < 64; i++)
        if ((i < 16 || (i >= 32 && i < 48) || i >= 56) && c[i])
            fail("ldtilecfg has %d in the reserved byte %d.", c[i], i);
    memset(&tiles, 0, sizeof tiles);
    for (int t = 0; t < 8; t++) {
        int rows = c[48 + t], colsb = c[16 + 2 * t] | c[17 + 2 * t] << 8;
        if (rows > 16) fail("ldtilecfg gives tile %d %d rows, more than 16.", t, rows);
        if (colsb > 64) fail("ldtilecfg gives tile %d %d bytes a row, more than 64.", t, colsb);
        if (colsb % 4) fail("ldtilecfg gives tile %d %d bytes a row, no multiple of 4.", t, colsb);
        if (!rows != !colsb) fail("ldtilecfg gives tile %d %d rows of %d bytes.", t, rows, colsb);
        tiles.rows[t] = rows;
        tiles.colsb[t] = colsb;
    }
    tiles.configured = 1;
}

/* Row by row, and no byte more than the tile has: a guard page faults as it does on silicon. */
static void load(int t, const uint8_t *address, int64_t stride) {
    memset(tiles.data[t], 0, sizeof tiles.data[t]);
    for (int r = 0; r < tiles.rows[t]; r++, address += stride)
        memcpy(tiles.data[t][r], address, tiles.colsb[t]);
}

static void store(int t, uint8_t *address, int64_t stride) {
    for (int r = 0; r < tiles.rows[t]; r++, address += stride)
        memcpy(address, tiles.data[t][r], tiles.colsb[t]);
}

/* C += A B with the SDM's order of operations ("TDPBF16PS", Operation). For each number of C two
sums begin at zero: one of the even members of all pairs, one of the odd ones, each a chain of fused
multiply-adds over k. The two are added to each other, and then to C. Denormals count as zero and
become zero, and each step rounds to nearest even: MXCSR does that here. Not inlined, so that no
arithmetic moves before the change of MXCSR. */
__attribute__((noinline)) static void multiply(int c, int a, int b) {
    const __m256i upper = _mm256_set1_epi32((int)0xffff0000);
    int pairs = tiles.rows[b];
    __m256 even[16][2], odd[16][2];
    for (int k = 0; k < pairs; k++)
        for (int half = 0; half < 2; half++) {
            __m256i both = _mm256_load_si256((__m256i *)(tiles.data[b][k] + 32 * half));
            even[k][half] = _mm256_castsi256_ps(_mm256_slli_epi32(both, 16));
            odd[k][half] = _mm256_castsi256_ps(_mm256_and_si256(both, upper));
        }
    for (int m = 0; m < tiles.rows[c]; m++) {
        __m256 e0 = _mm256_setzero_ps(), e1 = e0, o0 = e0, o1 = e0;
        for (int k = 0; k < pairs; k++) {
            int32_t pair;
            memcpy(&pair, tiles.data[a][m] + 4 * k, 4);
            __m256i both = _mm256_set1_epi32(pair);
            __m256 a_even = _mm256_castsi256_ps(_mm256_slli_epi32(both, 16));
            __m256 a_odd = _mm256_castsi256_ps(_mm256_and_si256(both, upper));
            e0 = _mm256_fmadd_ps(a_even, even[k][0], e0);
            e1 = _mm256_fmadd_ps(a_even, even[k][1], e1);
            o0 = _mm256_fmadd_ps(a_odd, odd[k][0], o0);
            o1 = _mm256_fmadd_ps(a_odd, odd[k][1], o1);
        }
        float row[16], *old = (float *)tiles.data[c][m];
        _mm256_storeu_ps(row, _mm256_add_ps(_mm256_load_ps(old), _mm256_add_ps(e0, o0)));
        _mm256_storeu_ps(row + 8, _mm256_add_ps(_mm256_load_ps(old + 8), _mm256_add_ps(e1, o1)));
        memcpy(old, row, tiles.colsb[c]); /* what lies right of the tile stays zero */
    }
}

static void dot_product(int c, int a, int b) {
    need_tile("tdpbf16ps", c);
    need_tile("tdpbf16ps", a);
    need_tile("tdpbf16ps", b);
    if (c == a || c == b || a == b)
        fail("tdpbf16ps uses a tile twice: %d += %d times %d.", c, a, b);
    if (tiles.rows[c] != tiles.rows[a] || tiles.colsb[c] != tiles.colsb[b] ||
        tiles.colsb[a] != 4 * tiles.rows[b])
        fail("tdpbf16ps has shapes that do not fit, in rows x bytes: %dx%d += %dx%d times %dx%d.",
             tiles.rows[c], tiles.colsb[c], tiles.rows[a], tiles.colsb[a], tiles.rows[b],
             tiles.colsb[b]);
    _mm_setcsr(DAZ_FTZ_NEAREST_NO_EXCEPTIONS); /* the interrupted program gets its own back */
    multiply(c, a, b);
}

typedef struct {
    uint64_t base;   /* base register + displacement, or RIP + displacement */
    uint64_t index;  /* index register << scale: zero where there is none */
    int has_sib;
    const uint8_t *end;
} Memory;

static Memory memory(const uint8_t *modrm, int x, int b, const greg_t *registers) {
    static const int ORDER[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP,
                                  REG_RSI, REG_RDI, REG_R8,  REG_R9,  REG_R10, REG_R11,
                                  REG_R12, REG_R13, REG_R14, REG_R15};
    int mod = *modrm >> 6, base = *modrm & 7, bytes = mod == 1 ? 1 : mod == 2 ? 4 : 0;
    Memory found = {0, 0, base == 4, modrm + 1};
    int is_relative = mod == 0 && base == 5, has_base = !is_relative;
    if (found.has_sib) {
        uint8_t sib = *found.end++;
        int index = (sib >> 3 & 7) | x << 3;
        base = sib & 7;
        has_base = mod != 0 || base != 5;
        if (index != 4) found.index = (uint64_t)registers[ORDER[index]] << (sib >> 6);
    }
    if (has_base)
        found.base = registers[ORDER[base | b << 3]];
    else
        bytes = 4;
    if (bytes == 1) found.base += (int64_t)(int8_t)*found.end;
    if (bytes == 4) {
        int32_t displacement;
        memcpy(&displacement, found.end, 4);
        found.base += (int64_t)displacement;
    }
    found.end += bytes;
    if (is_relative) found.base += (uint64_t)found.end;
    return found;
}

/* Executes the instruction at RIP and moves RIP behind it, or returns 0: it is none of ours. Bytes
are read only as far as those before them make an instruction of ours. */
static int step(greg_t *registers) {
    const uint8_t *code = (const uint8_t *)registers[REG_RIP];
    if (code[0] != 0xc4) return 0;
    if ((code[1] & 0x9f) != 0x82) return 0; /* map 0F38, and tiles end at 7: R is not set */
    if (code[2] & 0x84) return 0;           /* W0, 128 bits */
    int x = !(code[1] & 0x40), b = !(code[1] & 0x20), vvvv = ~code[2] >> 3 & 15, pp = code[2] & 3;
    int opcode = code[3];
    if (opcode != 0x49 && opcode != 0x4b && opcode != 0x5c) return 0;
    int mod = code[4] >> 6, reg = code[4] >> 3 & 7, rm = code[4] & 7, done = -1;
    const uint8_t *end = code + 5;
    if (mod == 3) {
        if (opcode == 0x5c && pp == PP_F3 && !b && vvvv < 8) {
            dot_product(reg, rm, vvvv);
            done = TDPBF16PS;
        } else if (opcode == 0x49 && pp == PP_F2 && rm == 0 && !vvvv) {
            need_tile("tilezero", reg);
            memset(tiles.data[reg], 0, sizeof tiles.data[reg]);
            done = TILEZERO;
        } else if (opcode == 0x49 && pp == PP_NONE && code[4] == 0xc0 && !vvvv) {
            memset(&tiles, 0, sizeof tiles);
            done = TILERELEASE;
        }
    } else if (opcode != 0x5c && !vvvv) {
        Memory at = memory(code + 4, x, b, registers);
        end = at.end;
        if (opcode == 0x49 && pp == PP_NONE && reg == 0) {
            configure((const uint8_t *)(at.base + at.index));
            done = LDTILECFG;
        } else if (opcode == 0x4b && at.has_sib && (pp == PP_F2 || pp == PP_66)) {
            need_tile("tileloadd", reg);
            load(reg, (const uint8_t *)at.base, at.index);
            done = TILELOADD;
        } else if (opcode == 0x4b && at.has_sib && pp == PP_F3) {
            need_tile("tilestored", reg);
            store(reg, (uint8_t *)at.base, at.index);
            done = TILESTORED;
        }
    }
    if (done < 0) return 0;
    __atomic_fetch_add(&counts[done], 1, __ATOMIC_RELAXED);
    registers[REG_RIP] = (greg_t)end;
    return 1;
}

/* Instructions of ours that follow each other cost one trap together. */
static void handle(int number, siginfo_t *info, void *context) {
    greg_t *registers = ((ucontext_t *)context)->uc_mcontext.gregs;
    if (step(registers)) {
        while (step(registers)) {}
    } else if (before.sa_flags & SA_SIGINFO) {
        before.sa_sigaction(number, info, context);
    } else if (before.sa_handler == SIG_DFL || before.sa_handler == SIG_IGN) {
        signal(SIGILL, SIG_DFL); /* the instruction runs again, and now it kills */
    } else {
        before.sa_handler(number);
    }
}

/* A kernel must not carry tiles over a fork: Linux gives the child none. */
static void forget(void) { memset(&tiles, 0, sizeof tiles); }

__attribute__((constructor)) static void install(void) {
    struct sigaction action = {.sa_sigaction = handle, .sa_flags = SA_SIGINFO | SA_NODEFER};
    sigemptyset(&action.sa_mask);
    sigaction(SIGILL, &action, &before);
    pthread_atfork(NULL, NULL, forget);
}

/* How often each instruction was executed, in the order of the names above. */
void amx_counts(uint64_t *out) {
    for (int i = 0; i < INSTRUCTIONS; i++) out[i] = __atomic_load_n(&counts[i], __ATOMIC_RELAXED);
}

void amx_reset(void) {
    for (int i = 0; i < INSTRUCTIONS; i++) __atomic_store_n(&counts[i], 0, __ATOMIC_RELAXED);
}
