/*
 * talker PATH: connects to the unix socket and copies standard input to it and what it says to standard output, each
 * until its end, of which the other side is told; ends when both have ended, or when the other side has closed.
 * talker -l PATH: listens there, says "listening", and answers each connection with what it says, up to its end.
 * talker -k PATH: locks the file (flock(2)) and says "locked", up to the end of standard input; or says "refused".
 * For images that have no such programs.
 */
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

static void fail(const char *what)
{
	perror(what);
	exit(1);
}

/* Copies what there is; false at the end. */
static int copy(int from, int to)
{
	static char bytes[1 << 16];
	ssize_t length = read(from, bytes, sizeof(bytes));

	if (length < 0)
		fail("read");
	for (ssize_t at = 0, written; at < length; at += written) {
		written = write(to, bytes + at, length - at);
		if (written < 0)
			fail("write");
	}
	return length > 0;
}

static void talk(int peer)
{
	struct pollfd fds[2] = {{.fd = STDIN_FILENO, .events = POLLIN}, {.fd = peer, .events = POLLIN}};

	while (fds[0].fd >= 0 || fds[1].events) {
		if (poll(fds, 2, -1) < 0)
			fail("poll");
		if (fds[0].fd >= 0 && fds[0].revents && !copy(STDIN_FILENO, peer)) {
			shutdown(peer, SHUT_WR);
			fds[0].fd = -1;
		}
		if (fds[1].events && fds[1].revents && !copy(peer, STDOUT_FILENO)) {
			fds[1].events = 0;
		} else if (!fds[1].events && fds[1].revents & POLLHUP) {
			return;
		}
	}
}

static int lock(const char *path)
{
	int fd = open(path, O_RDWR | O_CREAT, 0666), locked;

	if (fd < 0)
		fail("open");
	locked = !flock(fd, LOCK_EX | LOCK_NB);
	puts(locked ? "locked" : "refused");
	fflush(stdout);
	while (locked && copy(STDIN_FILENO, STDOUT_FILENO))
		;
	return 0;
}

int main(int argc, char **argv)
{
	struct sockaddr_un address = {.sun_family = AF_UNIX};
	int listens = argc == 3 && !strcmp(argv[1], "-l");
	if (argc == 3 && !strcmp(argv[1], "-k"))
		return lock(argv[2]);
	int fd = socket(AF_UNIX, SOCK_STREAM, 0), peer;

	if (argc != 2 + listens || strlen(argv[argc - 1]) >= sizeof(address.sun_path)) {
		fputs("usage: talker [-l|-k] PATH\n", stderr);
		return 1;
	}
	signal(SIGPIPE, SIG_IGN);
	strcpy(address.sun_path, argv[argc - 1]);
	if (!listens) {
		if (connect(fd, (struct sockaddr *)&address, sizeof(address)) < 0)
			fail("connect");
		talk(fd);
		return 0;
	}
	if (bind(fd, (struct sockaddr *)&address, sizeof(address)) < 0 || listen(fd, 8) < 0)
		fail("listen");
	puts("listening");
	fflush(stdout);
	while ((peer = accept(fd, NULL, NULL)) >= 0) {
		while (copy(peer, peer))
			;
		close(peer);
	}
	fail("accept");
}
