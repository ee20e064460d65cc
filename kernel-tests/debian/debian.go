// Package debian installs what a program of this repository needs from Debian's
// packages.
package debian

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
)

// Tool is a program, or the absolute path of any other file, and the package that it
// comes in.
type Tool struct{ Program, Package string }

// present says whether the machine has the tool.
func (t Tool) present() bool {
	if !filepath.IsAbs(t.Program) {
		_, err := exec.LookPath(t.Program)
		return err == nil
	}
	_, err := os.Stat(t.Program)
	return err == nil
}

// The programs that tests, demo and bench use.
var (
	MkfsErofs  = Tool{"mkfs.erofs", "erofs-utils"}
	FsckErofs  = Tool{"fsck.erofs", "erofs-utils"}
	Mmdebstrap = Tool{"mmdebstrap", "mmdebstrap"}
	MkfsExt4   = Tool{"mkfs.ext4", "e2fsprogs"}
	Tar        = Tool{"tar", "tar"}
	Zstd       = Tool{"zstd", "zstd"}
	Cpio       = Tool{"cpio", "cpio"}
	Qemu       = Tool{"qemu-system-x86_64", "qemu-system-x86"}
	QemuDisks  = Tool{"qemu-storage-daemon", "qemu-system-common"}

	DockerRegistry = Tool{"docker-registry", "docker-registry"}
	Squid          = Tool{"/usr/sbin/squid", "squid"} // ordinary users' PATH lacks it
	Sgdisk         = Tool{"/usr/sbin/sgdisk", "gdisk"}
	Systemd        = Tool{"/usr/lib/systemd/systemd", "systemd"} // its program alone changes nothing
	Containerd     = Tool{"containerd", "containerd"}
	Runc           = Tool{"/usr/sbin/runc", "runc"}
)

// ErrMissing is what every error of Ensure is.
var ErrMissing = errors.New("missing Debian packages")

// Ensure installs the packages of those tools that are missing, when it runs as
// root on a machine with apt; progress is told before. Otherwise, and when apt
// cannot, the error is an ErrMissing that names the packages.
func Ensure(ctx context.Context, progress func(string), tools ...Tool) error {
	var missing []string
	for _, t := range tools {
		if !t.present() {
			missing = append(missing, t.Package)
		}
	}
	if len(missing) == 0 {
		return nil
	}
	list := strings.Join(missing, " ")
	if os.Geteuid() != 0 {
		return fmt.Errorf("%w, and only root can install them: apt-get install %s", ErrMissing, list)
	}
	progress("installing " + list)
	if err := apt(ctx, "update"); err != nil {
		return fmt.Errorf("%w %s: %w", ErrMissing, list, err)
	}
	if err := apt(ctx, append([]string{"install", "-y", "--no-install-recommends"}, missing...)...); err != nil {
		return fmt.Errorf("%w %s: %w", ErrMissing, list, err)
	}
	return nil
}

// Version is that of an installed package.
func Version(ctx context.Context, name string) (string, error) {
	out, err := exec.CommandContext(ctx, "dpkg-query", "-W", "-f", "${db:Status-Status} ${Version}", name).Output()
	status, version, _ := strings.Cut(string(out), " ")
	if err != nil || status != "installed" {
		return "", fmt.Errorf("the Debian package %s is not installed: %w", name, fs.ErrNotExist)
	}
	return version, nil
}

func apt(ctx context.Context, args ...string) error {
	cmd := exec.CommandContext(ctx, "apt-get", append([]string{"-q"}, args...)...)
	cmd.Env = append(os.Environ(), "DEBIAN_FRONTEND=noninteractive")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("apt-get %s: %w\n%s", args[0], err, tail(out))
	}
	return nil
}

var address = regexp.MustCompile(`\b[a-z+]+://\S+`)

// tail returns the last lines of a command's output, without the addresses that
// this machine gets its packages from.
func tail(out []byte) []byte {
	lines := bytes.Split(bytes.TrimSpace(out), []byte("\n"))
	last := bytes.Join(lines[max(0, len(lines)-5):], []byte("\n"))
	return address.ReplaceAll(last, []byte("(mirror)"))
}
