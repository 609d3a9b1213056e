/* What the images of critest need and Debian's busybox lacks. Which of them runs, its name says. */
#define _GNU_SOURCE
#include <ctype.h>
#include <dirent.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/shm.h>
#include <unistd.h>

/* pgrep PATTERN: the pids of all other processes whose name has PATTERN in it; status 1 if none has. */
static int pgrep(const char *pattern) {
    int found = 0;
    DIR *proc = opendir("/proc");
    if (!proc) return perror("pgrep: /proc"), 2;
    for (struct dirent *entry; (entry = readdir(proc));) {
        char path[300], name[64] = "";
        if (!isdigit((unsigned char)entry->d_name[0]) || atoi(entry->d_name) == getpid()) continue;
        snprintf(path, sizeof path, "/proc/%s/comm", entry->d_name);
        FILE *comm = fopen(path, "r");
        if (!comm) continue; /* it has ended */
        if (fgets(name, sizeof name, comm) && strstr(name, pattern)) found = puts(entry->d_name) >= 0;
        fclose(comm);
    }
    closedir(proc);
    return !found;
}

/* ipcs -m: the segments of shared memory in this ipc namespace, as the system's calls tell them. */
static int ipcs(void) {
    struct shmid_ds segment;
    int last = shmctl(0, SHM_INFO, &segment);
    if (last < 0) return perror("ipcs: shmctl(SHM_INFO)"), 1;
    puts("key        shmid      bytes");
    for (int index = 0; index <= last; index++) {
        int id = shmctl(index, SHM_STAT, &segment);
        if (id >= 0) printf("0x%08x %-10d %zu\n", segment.shm_perm.__key, id, segment.shm_segsz);
    }
    return 0;
}

int main(int argc, char **argv) {
    const char *name = basename(argv[0]);
    if (!strcmp(name, "pgrep") && argc == 2) return pgrep(argv[1]);
    if (!strcmp(name, "ipcs") && argc == 2 && !strcmp(argv[1], "-m")) return ipcs();
    /* Installed with the set-user-id bit, which no_new_privs takes the force of. */
    if (!strcmp(name, "nonewprivs")) return printf("Effective uid: %d\n", geteuid()) < 0;
    fprintf(stderr, "usage: pgrep PATTERN | ipcs -m | nonewprivs\n");
    return 2;
}
