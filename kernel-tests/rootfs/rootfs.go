// Package rootfs makes the root file system that demo and measurements use: a
// Debian 12 with Python and numpy, about 300 MB in 12 000 files, from Debian's
// packages by mmdebstrap. It is made once and kept outside of the checkout.
package rootfs

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"strings"
	"syscall"
)

// The recipe. Whatever changes in it makes another image.
const (
	suite    = "bookworm"
	variant  = "important"
	packages = "python3-numpy"
	epoch    = "1790000000" // newest time stamp in the image: 2026-09-21
	// bytecode makes Python's compiled modules again as installations have them: with
	// SOURCE_DATE_EPOCH set they are checked by content, so that every import reads the
	// source as well. Sources newer than the epoch get its time first, as in the tar.
	bytecode = `find "$1/usr" -newermt @` + epoch + ` -exec touch -h -d @` + epoch + ` {} + && ` +
		`chroot "$1" env -u SOURCE_DATE_EPOCH python3 -m compileall -q -f --invalidation-mode timestamp /usr/lib/python3 /usr/lib/python3.11`
	// cleanup removes where this machine gets its packages from, logs with times in
	// them, and the hardware database, which is large and of no use here.
	cleanup = `cd "$1" && rm -rf etc/apt/sources.list etc/apt/sources.list.d/* etc/apt/apt.conf.d/99mmdebstrap ` +
		`var/cache/ldconfig/aux-cache var/log/apt var/log/*.log usr/lib/udev/hwdb.d usr/lib/udev/hwdb.bin`
)

// Image is a root file system that has been built.
type Image struct {
	Tar string // path of the tar file: entries sorted, with owners and devices
	dir string
}

// CacheDir is where this repository's tools keep what takes long to make:
// $EROFSD_CACHE, $XDG_CACHE_HOME/erofsd or /var/cache/erofsd.
func CacheDir() string {
	if dir := os.Getenv("EROFSD_CACHE"); dir != "" {
		return dir
	}
	return filepath.Join(cmp.Or(os.Getenv("XDG_CACHE_HOME"), "/var/cache"), "erofsd")
}

// Build returns the image, and makes it first when there is none of this recipe in
// the cache: that takes about a minute, and progress is told every step. Several
// processes may call it at once. It needs root, mmdebstrap, and apt's sources for
// Debian 12 or the network.
func Build(ctx context.Context, progress func(string)) (*Image, error) {
	recipe := sha256.Sum256([]byte(strings.Join([]string{suite, variant, packages, epoch, bytecode, cleanup, runtime.GOARCH}, "\x00")))
	dir := filepath.Join(CacheDir(), "rootfs-"+hex.EncodeToString(recipe[:6]))
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, err
	}
	unlock, err := lock(filepath.Join(dir, "lock"))
	if err != nil {
		return nil, err
	}
	defer unlock()
	image := &Image{Tar: filepath.Join(dir, "rootfs.tar"), dir: dir}
	if _, err := os.Stat(image.Tar); err == nil {
		return image, nil
	}
	progress("building a Debian root file system in " + dir + " (about a minute, once)")
	part := image.Tar + ".part"
	if err := debootstrap(ctx, part, progress); err != nil {
		return nil, errors.Join(fmt.Errorf("build the root file system: %w", err), os.RemoveAll(part))
	}
	return image, os.Rename(part, image.Tar)
}

// Tree returns the directory with the image unpacked, which it is once.
func (i *Image) Tree(ctx context.Context) (string, error) {
	unlock, err := lock(filepath.Join(i.dir, "lock"))
	if err != nil {
		return "", err
	}
	defer unlock()
	tree := filepath.Join(i.dir, "tree")
	if _, err := os.Stat(tree); err == nil {
		return tree, nil
	}
	part := tree + ".part"
	if err := os.RemoveAll(part); err != nil {
		return "", err
	}
	if err := Unpack(ctx, i.Tar, part); err != nil {
		return "", err
	}
	return tree, os.Rename(part, tree)
}

// Unpack extracts a tar file, compressed or not, into the new directory dir. It
// needs root.
func Unpack(ctx context.Context, tar, dir string) error {
	if err := os.Mkdir(dir, 0o755); err != nil {
		return err
	}
	cmd := exec.CommandContext(ctx, "tar", "-C", dir, "--numeric-owner", "--xattrs", "--xattrs-include=*", "-xpf", tar)
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("unpack %s: %w: %s", tar, err, bytes.TrimSpace(out))
	}
	return nil
}

// debootstrap makes the tar file name.
func debootstrap(ctx context.Context, name string, progress func(string)) error {
	options, err := aptOptions(ctx)
	if err != nil {
		return err
	}
	defer os.Remove(options)
	args := []string{
		"--mode=auto", "--format=tar", "--variant=" + variant, "--include=" + packages,
		"--aptopt=" + options, "--customize-hook=" + bytecode, "--customize-hook=" + cleanup, suite, name,
	}
	mirrors, err := sources("/etc/apt")
	if err != nil {
		return err
	}
	cmd := exec.CommandContext(ctx, "mmdebstrap", append(args, mirrors...)...)
	cmd.Env = append(os.Environ(), "SOURCE_DATE_EPOCH="+epoch, "LC_ALL=C.UTF-8")
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) } // it cleans up behind itself
	stderr, err := cmd.StderrPipe()
	if err != nil {
		return err
	}
	if err := cmd.Start(); err != nil {
		return err
	}
	said, err := follow(stderr, progress)
	if err := errors.Join(err, cmd.Wait()); err != nil {
		return fmt.Errorf("mmdebstrap: %w\n%s", err, said)
	}
	return nil
}

var address = regexp.MustCompile(`\b[a-z+]+://\S+`)

// follow passes mmdebstrap's steps on to progress and returns its last lines.
// Where this machine's packages come from is nobody else's business.
func follow(r io.Reader, progress func(string)) (tail string, err error) {
	var last []string
	lines := bufio.NewScanner(r)
	for lines.Scan() {
		line := address.ReplaceAllString(lines.Text(), "(mirror)")
		if step, ok := strings.CutPrefix(line, "I: "); ok {
			progress("mmdebstrap: " + step)
		}
		last = append(last, line)
		last = last[max(0, len(last)-15):]
	}
	return strings.Join(last, "\n"), lines.Err()
}

// sources returns the files below etc, apt's configuration, that name Debian's own
// packages for the suite. With none of them mmdebstrap takes its default mirror.
func sources(etc string) ([]string, error) {
	var files []string
	for _, pattern := range []string{"sources.list", "sources.list.d/*.list", "sources.list.d/*.sources"} {
		names, err := filepath.Glob(filepath.Join(etc, pattern))
		if err != nil {
			return nil, err
		}
		for _, name := range names {
			text, err := os.ReadFile(name)
			if err != nil {
				return nil, err
			}
			if ours.Match(text) {
				files = append(files, name)
			}
		}
	}
	return files, nil
}

// ours matches a source of Debian's own, in either format: others have no
// component main of this suite.
var ours = regexp.MustCompile(`(?m)^deb .*\b` + suite + `\b.* main\b|^Suites:.*\b` + suite + `\b(?s:.*)^Components:.*\bmain\b`)

// aptOptions returns a new file with how this machine's apt fetches: proxies,
// retries and which checks it does.
func aptOptions(ctx context.Context) (name string, err error) {
	config, err := exec.CommandContext(ctx, "apt-config", "dump").Output()
	if err != nil {
		return "", fmt.Errorf("apt-config dump: %w", err)
	}
	f, err := os.CreateTemp("", "erofsd-apt-*")
	if err != nil {
		return "", err
	}
	for line := range strings.Lines(string(config)) {
		if fetching.MatchString(line) && err == nil {
			_, err = f.WriteString(line)
		}
	}
	return f.Name(), errors.Join(err, f.Close())
}

var fetching = regexp.MustCompile(`^Acquire::(http|https|Check-Valid-Until|Check-Date|Retries)\b`)

// lock takes the lock file name for this process.
func lock(name string) (unlock func(), err error) {
	f, err := os.OpenFile(name, os.O_CREATE|os.O_RDWR, 0o644)
	if err != nil {
		return nil, err
	}
	if err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX); err != nil {
		f.Close()
		return nil, fmt.Errorf("lock %s: %w", name, err)
	}
	return func() { f.Close() }, nil
}
