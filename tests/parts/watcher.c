/*
 * watcher FOLDER: prints the name of whatever is moved into the folder, a line each, as inotify(7) tells it. Says
 * "watching" first. For images that have no such program.
 */
#include <stdio.h>
#include <sys/inotify.h>
#include <unistd.h>

int main(int argc, char **argv)
{
	char events[4096] __attribute__((aligned(__alignof__(struct inotify_event))));
	int fd = inotify_init1(IN_CLOEXEC);
	ssize_t length;

	if (argc != 2 || fd < 0 || inotify_add_watch(fd, argv[1], IN_MOVED_TO) < 0) {
		perror("watcher");
		return 1;
	}
	setvbuf(stdout, NULL, _IOLBF, 0);
	puts("watching");
	while ((length = read(fd, events, sizeof(events))) > 0) {
		for (char *at = events; at < events + length;) {
			struct inotify_event *event = (struct inotify_event *)at;

			puts(event->len ? event->name : "");
			at += sizeof(*event) + event->len;
		}
	}
	perror("watcher");
	return 1;
}
