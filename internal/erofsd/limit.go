package erofsd

import (
	"errors"
	"fmt"
	"log/slog"
	"os"
	"strconv"
	"strings"
	"syscall"
)

// What the rest of the machine needs of its descriptors, and what nydusd asks for at most.
const (
	otherFiles = 16384
	leastFiles = 2 * otherFiles
	mostFiles  = 1000000
)

// descriptors says what limit to ask for: want, but not so many of the fileMax that the
// whole machine has that others lack them. given says that want is not just the default,
// which never lowers the present limit.
func descriptors(want, fileMax, present uint64, given bool) (uint64, error) {
	if fileMax < leastFiles {
		return 0, errors.New("the fs.file-max sysctl is too low to allow a reasonable number of open files")
	}
	n := min(want, max(min(fileMax-otherFiles, mostFiles), present))
	if !given {
		n = max(n, present)
	}
	return n, nil
}

// setFileLimit sets the limit of descriptors to n as far as the machine allows; 0 leaves it
// alone. A kernel that refuses is no end: reads beyond the limit wait in its queue.
func setFileLimit(n int, given bool, log *slog.Logger) error {
	if n == 0 {
		return nil
	}
	text, err := os.ReadFile("/proc/sys/fs/file-max")
	if err != nil {
		return fmt.Errorf("limit of file descriptors: %w", err)
	}
	fileMax, err := strconv.ParseUint(strings.TrimSpace(string(text)), 10, 64)
	if err != nil {
		return fmt.Errorf("limit of file descriptors: fs.file-max: %w", err)
	}
	var l syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &l); err != nil {
		return fmt.Errorf("limit of file descriptors: %w", err)
	}
	want, err := descriptors(uint64(n), fileMax, l.Cur, given)
	if err != nil || want == l.Cur {
		return err
	}
	err = syscall.Setrlimit(syscall.RLIMIT_NOFILE, &syscall.Rlimit{Cur: want, Max: max(l.Max, want)})
	if err == nil {
		return nil
	}
	best := min(want, l.Max) // for that nobody is asked
	if lerr := syscall.Setrlimit(syscall.RLIMIT_NOFILE, &syscall.Rlimit{Cur: best, Max: l.Max}); lerr != nil {
		best = l.Cur
	}
	log.Warn("cannot raise the limit of file descriptors; many blobs or waiting reads may reach it (set LimitNOFILE)",
		"limit", best, "wanted", want, "err", err)
	return nil
}
