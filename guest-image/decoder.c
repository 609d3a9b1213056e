/*
 * Hold the short way of the kernel's decoder of instructions (kernel/insn-decode-short.patch) against the general
 * one: whatever the short way takes, the general one must fill in the same bytes. Built by test-decoder from the
 * patched source of the kernel itself; knows nothing of how either way works.
 */
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define unlikely(cond) (cond)
#define ARRAY_SIZE(a) (sizeof(a) / sizeof((a)[0]))

#include "inat.c"
#include "insn.c"

static uint64_t state = 88172645463325252u;

/* xorshift64: the same numbers at each run. */
static uint64_t next_random(void)
{
	state ^= state << 13;
	state ^= state >> 7;
	state ^= state << 17;
	return state;
}

/* check: both ways for one buffer; true where the short way took it. */
static bool check(const uint8_t *code, int length, int x86_64)
{
	struct insn general, quick;
	int ret;

	/* Padding is compared too. */
	memset(&general, 0, sizeof(general));
	memset(&quick, 0, sizeof(quick));
	insn_init(&general, code, length, x86_64);
	insn_init(&quick, code, length, x86_64);
	if (!insn_decode_short(&quick)) {
		if (memcmp(&quick, &(struct insn){ 0 }, offsetof(struct insn, opnd_bytes)) == 0)
			return false;
		printf("the short way refused %02x and left something behind\n", code[0]);
		exit(1);
	}
	ret = insn_get_length(&general);
	if (ret == 0 && insn_complete(&general) && memcmp(&general, &quick, sizeof(quick)) == 0)
		return true;
	printf("the two ways differ for %02x %02x %02x %02x %02x, %d bytes (general: %d)\n", code[0], code[1], code[2],
	       code[3], code[4], length, ret);
	exit(1);
}

int main(void)
{
	unsigned long all = 0, taken = 0, kinds = 0;
	bool seen[256] = { false };

	for (int first = 0; first < 256; first++) {
		for (int round = 0; round < 8192; round++) {
			uint8_t code[MAX_INSN_SIZE + 1];
			int length = 1 + next_random() % sizeof(code);

			for (size_t i = 0; i < sizeof(code); i++)
				code[i] = next_random();
			code[0] = first;
			all++;
			if (check(code, length, 1)) {
				taken++;
				seen[first] = true;
			}
			if (check(code, length, 0)) {
				printf("the short way took code of 32 bits\n");
				return 1;
			}
		}
	}
	for (size_t i = 0; i < ARRAY_SIZE(seen); i++)
		kinds += seen[i];
	if (kinds != 6) {
		printf("the short way took %lu kinds of instructions, not 6\n", kinds);
		return 1;
	}
	printf("%lu of %lu instructions went the short way, and all were the same\n", taken, all);
	return 0;
}
