// Command check is what runs in containers. It prints one digest of all files in /data; with
// the argument wait it says that it runs, and reads them when its standard input ends.
//
//	check write FILE TEXT   writes a file
//	check show FILE...      prints files
//	check read DIRECTORY    prints the digest of a directory that is /data elsewhere
//	check count DIRECTORY   prints how many entries a directory has
//	check owner FILE        prints the user and group of a file, as they are in the container
//	check pause             does nothing until it is told to end
package main

import (
	"crypto/sha256"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"
)

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
}

func run(args []string) error {
	if len(args) == 0 {
		return writable()
	}
	switch files := args[1:]; args[0] {
	case "wait":
		fmt.Println("waits")
		if _, err := io.Copy(io.Discard, os.Stdin); err != nil {
			return err
		}
		return writable()
	case "write":
		return os.WriteFile(files[0], []byte(files[1]), 0o644)
	case "show":
		return show(files)
	case "read":
		return digest(files[0])
	case "count":
		entries, err := os.ReadDir(files[0])
		fmt.Println(len(entries))
		return err
	case "owner":
		var st syscall.Stat_t
		err := syscall.Stat(files[0], &st)
		fmt.Println(st.Uid, st.Gid)
		return err
	case "pause":
		end := make(chan os.Signal, 1)
		signal.Notify(end, syscall.SIGTERM)
		<-end
		return nil
	}
	return fmt.Errorf("unknown arguments %q", args)
}

func show(files []string) error {
	for _, name := range files {
		p, err := os.ReadFile(name)
		if err != nil {
			return err
		}
		fmt.Println(string(p))
	}
	return nil
}

// writable prints the digest of /data when a file can be written there.
func writable() error {
	if err := os.WriteFile("/data/new", nil, 0o600); err != nil {
		return err
	}
	return digest("/data")
}

// digest prints one of all files in dir.
func digest(dir string) error {
	all := sha256.New()
	err := filepath.WalkDir(dir, func(name string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() || d.Name() == "new" {
			return err
		}
		p, err := os.ReadFile(name)
		fmt.Fprintf(all, "/data/%s %x\n", d.Name(), sha256.Sum256(p))
		return err
	})
	if err != nil {
		return err
	}
	fmt.Printf("read %x\n", all.Sum(nil))
	return nil
}
