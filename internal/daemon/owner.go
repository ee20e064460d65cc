package daemon

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/user"
	"path/filepath"
	"strconv"
	"syscall"

	"github.com/erofsd/erofsd/internal/sandbox"
)

// findUser looks up who the daemon becomes; nil for "".
func findUser(name string) (*sandbox.User, error) {
	if name == "" {
		return nil, nil
	}
	u, err := user.Lookup(name)
	if err != nil {
		return nil, fmt.Errorf("become user %s: %w", name, err)
	}
	uid, err := strconv.Atoi(u.Uid)
	gid, gerr := strconv.Atoi(u.Gid)
	if err := errors.Join(err, gerr); err != nil {
		return nil, fmt.Errorf("become user %s: %w", name, err)
	}
	return &sandbox.User{UID: uid, GID: gid}, nil
}

// ownDirs are the directories of Root that are the daemon's alone.
func (o Options) ownDirs() []string {
	return []string{filepath.Join(o.Root, "images"), filepath.Join(o.Root, "cache")}
}

// reclaim gives back to this process what a predecessor gave to the user that it became.
func (c *confinement) reclaim(o Options) error {
	if c == nil || c.user == nil {
		return nil
	}
	for _, dir := range o.ownDirs() {
		if err := ownTree(dir, c.user.UID, os.Geteuid(), os.Getegid()); err != nil {
			return fmt.Errorf("take %s back from user %d: %w", dir, c.user.UID, err)
		}
	}
	return nil
}

// give gives the daemon's directories to the user that it becomes, and lets it through to
// them.
func (c *confinement) give(o Options) error {
	if c.user == nil {
		return nil
	}
	for _, dir := range o.ownDirs() {
		if err := ownTree(dir, os.Geteuid(), c.user.UID, c.user.GID); err != nil {
			return fmt.Errorf("give %s to user %d: %w", dir, c.user.UID, err)
		}
	}
	const through = 0o011
	st, err := os.Stat(o.Root)
	if err == nil && st.Mode().Perm()&through != through {
		err = os.Chmod(o.Root, st.Mode().Perm()|through)
	}
	if err != nil {
		return fmt.Errorf("let user %d through to %s: %w", c.user.UID, o.Root, err)
	}
	return nil
}

// ownTree gives a directory that belongs to from, and what is directly in it, to a user. What
// has further names stays as it is: from may have linked somebody else's file there.
func ownTree(dir string, from, uid, gid int) error {
	if st, err := os.Stat(dir); err != nil || int(st.Sys().(*syscall.Stat_t).Uid) != from {
		return err
	}
	root, err := os.OpenRoot(dir)
	if err != nil {
		return err
	}
	defer root.Close()
	entries, err := fs.ReadDir(root.FS(), ".")
	if err != nil {
		return err
	}
	give := func(name string) error {
		info, err := root.Lstat(name)
		if errors.Is(err, fs.ErrNotExist) {
			return nil // a temporary file
		}
		if err != nil {
			return err
		}
		if st := info.Sys().(*syscall.Stat_t); info.Mode().IsRegular() && st.Nlink != 1 {
			return nil
		}
		return root.Lchown(name, uid, gid)
	}
	for _, e := range entries {
		if err := give(e.Name()); err != nil {
			return err
		}
	}
	return give(".") // the last: now it is done
}
